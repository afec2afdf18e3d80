// Times ggml's matrix product on the CPU: one job a line of standard input, one line of JSON back.
//
//   make TYPE LAYOUT OUT IN TOKENS THREADS BYTES   random weights, quantized to TYPE, in as many copies as BYTES hold,
//                                                  in the buffer of LAYOUT ("plain", "repack"); fp32 activations
//   run JOB CALLS                                  one product a call, each with the next copy: processor time of this
//                                                  thread and wall time, in seconds
//   drop JOB
#include <time.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iostream>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "ggml.h"

namespace {

double seconds(clockid_t clock) {
  timespec now;
  clock_gettime(clock, &now);
  return now.tv_sec + 1e-9 * now.tv_nsec;
}

[[noreturn]] void stop(const std::string& why) {
  std::fprintf(stderr, "ggml_job: %s\n", why.c_str());
  std::exit(1);
}

ggml_type type_named(const std::string& name) {
  for (int type = 0; type < GGML_TYPE_COUNT; ++type) {
    const char* const found = ggml_type_name(static_cast<ggml_type>(type));
    if (found && name == found) return static_cast<ggml_type>(type);
  }
  stop("no type " + name);
}

ggml_backend_dev_t cpu() { return ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU); }

void* address(const char* name) { return ggml_backend_reg_get_proc_address(ggml_backend_dev_backend_reg(cpu()), name); }

ggml_backend_buffer_type_t buffer_type(const std::string& layout) {
  if (layout == "plain") return ggml_backend_cpu_buffer_type();
  const auto extra = reinterpret_cast<ggml_backend_dev_get_extra_bufts_t>(address("ggml_backend_dev_get_extra_bufts"));
  ggml_backend_buffer_type_t* each = extra ? extra(cpu()) : nullptr;
  for (; each && *each; ++each)
    if (std::strstr(ggml_backend_buft_name(*each), "REPACK")) return *each;
  stop("no layout " + layout);
}

struct Job {
  ggml_backend_t backend;
  ggml_threadpool_t pool;
  ggml_context *weights, *rest;
  ggml_backend_buffer_t buffers[2];
  std::vector<ggml_cgraph*> graphs;  // one for each copy
  size_t bytes, next;
  double error;
};

void product(Job& job) {
  ggml_cgraph* const graph = job.graphs[job.next++ % job.graphs.size()];
  if (ggml_backend_graph_compute(job.backend, graph) != GGML_STATUS_SUCCESS) stop("failed");
}

// The largest difference from the dequantized matrix's product, relative to the largest result, over the first token.
double error_of(ggml_type type, const std::vector<uint8_t>& packed, const std::vector<float>& x,
                const std::vector<float>& y, long m, long n) {
  std::vector<float> row(n);
  const size_t stride = ggml_row_size(type, n);
  double worst = 0, largest = 0;
  for (long i = 0; i < m; ++i) {
    if (type == GGML_TYPE_F32) std::memcpy(row.data(), packed.data() + i * stride, 4 * n);
    else ggml_get_type_traits(type)->to_float(packed.data() + i * stride, row.data(), n);
    double sum = 0;
    for (long k = 0; k < n; ++k) sum += double(row[k]) * x[k];
    worst = std::max(worst, std::fabs(sum - y[i]));
    largest = std::max(largest, std::fabs(sum));
  }
  return worst / largest;
}

Job make(ggml_type type, const std::string& layout, long m, long n, long tokens, int threads, size_t bytes) {
  Job job{};
  job.backend = ggml_backend_cpu_init();
  ggml_backend_cpu_set_n_threads(job.backend, threads);
  ggml_threadpool_params params = ggml_threadpool_params_default(threads);
  job.pool = ggml_threadpool_new(&params);
  ggml_backend_cpu_set_threadpool(job.backend, job.pool);
  job.bytes = ggml_row_size(type, n) * m;
  const size_t copies = std::max<size_t>(2, (bytes + job.bytes - 1) / job.bytes);

  job.weights = ggml_init({copies * ggml_tensor_overhead(), nullptr, true});
  std::vector<ggml_tensor*> matrices;
  for (size_t copy = 0; copy < copies; ++copy) matrices.push_back(ggml_new_tensor_2d(job.weights, type, n, m));
  job.buffers[0] = ggml_backend_alloc_ctx_tensors_from_buft(job.weights, buffer_type(layout));
  if (!job.buffers[0]) stop("no memory");
  ggml_backend_buffer_set_usage(job.buffers[0], GGML_BACKEND_BUFFER_USAGE_WEIGHTS);

  const size_t each = 2 * ggml_tensor_overhead() + ggml_graph_overhead_custom(8, false);
  job.rest = ggml_init({(copies + 2) * each, nullptr, true});
  ggml_tensor* const x = ggml_new_tensor_2d(job.rest, GGML_TYPE_F32, n, tokens);
  std::vector<ggml_tensor*> results;
  for (ggml_tensor* const matrix : matrices) {
    results.push_back(ggml_mul_mat(job.rest, matrix, x));
    job.graphs.push_back(ggml_new_graph_custom(job.rest, 8, false));
    ggml_build_forward_expand(job.graphs.back(), results.back());
  }
  job.buffers[1] = ggml_backend_alloc_ctx_tensors_from_buft(job.rest, ggml_backend_cpu_buffer_type());
  if (!job.buffers[1]) stop("no memory");

  std::mt19937 random(0);
  std::vector<float> numbers(m * n), activations(n * tokens), y(m * tokens);
  for (float& value : numbers) value = (static_cast<int>(random() & 0xffff) - 32768) * 1e-6f;
  for (float& value : activations) value = (static_cast<int>(random() & 0xffff) - 32768) / 32768.f;
  std::vector<uint8_t> packed(job.bytes);
  if (type == GGML_TYPE_F32) std::memcpy(packed.data(), numbers.data(), job.bytes);
  else ggml_quantize_chunk(type, numbers.data(), packed.data(), 0, m, n, nullptr);
  for (ggml_tensor* const matrix : matrices) ggml_backend_tensor_set(matrix, packed.data(), 0, job.bytes);
  ggml_backend_tensor_set(x, activations.data(), 0, 4 * activations.size());
  product(job);
  ggml_backend_tensor_get(results[0], y.data(), 0, 4 * y.size());
  job.error = error_of(type, packed, activations, y, m, n);
  return job;
}

void drop(Job& job) {
  for (ggml_backend_buffer_t buffer : job.buffers) ggml_backend_buffer_free(buffer);
  ggml_free(job.rest);
  ggml_free(job.weights);
  ggml_backend_free(job.backend);
  ggml_threadpool_free(job.pool);
}

void list(const char* name, const std::vector<double>& values, const char* end) {
  std::printf("\"%s\": [", name);
  for (size_t i = 0; i < values.size(); ++i) std::printf("%s%.9f", i ? ", " : "", values[i]);
  std::printf("]%s", end);
}

void features() {
  const auto get = reinterpret_cast<ggml_backend_get_features_t>(address("ggml_backend_get_features"));
  std::printf("{\"version\": \"%s\", \"features\": [", ggml_version());
  bool first = true;
  const ggml_backend_feature* each = get ? get(ggml_backend_dev_backend_reg(cpu())) : nullptr;
  for (; each && each->name; ++each) {
    if (!std::strcmp(each->value, "0")) continue;
    std::printf("%s\"%s\"", first ? "" : ", ", each->name);
    first = false;
  }
  std::printf("]}\n");
}

}  // namespace

int main() {
  ggml_log_set([](ggml_log_level, const char*, void*) {}, nullptr);  // it tells of every matrix
  features();
  std::fflush(stdout);
  std::map<int, Job> jobs;
  int made = 0;
  for (std::string what; std::cin >> what; std::fflush(stdout)) {
    if (what == "make") {
      std::string type, layout;
      long m, n, tokens;
      int threads;
      size_t bytes;
      if (!(std::cin >> type >> layout >> m >> n >> tokens >> threads >> bytes)) stop("make what?");
      const Job& job = jobs[made] = make(type_named(type), layout, m, n, tokens, threads, bytes);
      std::printf("{\"job\": %d, \"buffer\": \"%s\", \"bytes\": %zu, \"copies\": %zu, \"error\": %.3g}\n", made,
                  ggml_backend_buffer_name(job.buffers[0]), job.bytes, job.graphs.size(), job.error);
      ++made;
    } else if (what == "run") {
      int number, calls;
      if (!(std::cin >> number >> calls) || !jobs.count(number)) stop("run what?");
      std::vector<double> cpu, wall;
      for (int call = 0; call < calls; ++call) {
        const double since = seconds(CLOCK_MONOTONIC), cpu_since = seconds(CLOCK_THREAD_CPUTIME_ID);
        product(jobs[number]);
        cpu.push_back(seconds(CLOCK_THREAD_CPUTIME_ID) - cpu_since);
        wall.push_back(seconds(CLOCK_MONOTONIC) - since);
      }
      ggml_threadpool_pause(jobs[number].pool);  // its threads would go on spinning; the next product wakes them
      std::printf("{");
      list("cpu", cpu, ", ");
      list("wall", wall, "}\n");
    } else if (what == "drop") {
      int number;
      if (!(std::cin >> number) || !jobs.count(number)) stop("drop what?");
      drop(jobs[number]);
      jobs.erase(number);
      std::printf("{}\n");
    } else {
      stop("what is " + what + "?");
    }
  }
}
