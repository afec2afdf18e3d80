// What is around the products of one token: what the kernels are told of it.
#pragma once

#include <cstdint>

namespace layout {

// For every row of a batch and every head: softmax(scale q K^T) V. Heads share keys and values, heads / kv_heads of them in a
// row. Steps are in numbers (of the mask: bytes), from one to the next; the numbers of a vector lie side by side.
struct Attention {
  const char *q, *k, *v;
  const uint8_t* mask;  // 0: the key is not looked at; or null, for all of them
  char* out;            // (batch, heads, dv)
  int dtype;
  long batch, heads, kv_heads, keys, d, dv;  // d and dv: of keys and of values, multiples of 16
  long q_row, q_head, k_row, k_head, k_key, v_row, v_head, v_key, mask_row, mask_head, mask_key;
  float scale;
  int threads;

  long shared() const { return heads / kv_heads; }
};

// x / sqrt(mean of x^2 + eps) of rows of n numbers, a multiple of 16, times a weight; everything of one dtype.
struct Norm {
  const char *x, *weight;
  char* out;
  long rows, n;
  int dtype;
  float eps;
  bool more;     // the weight is one more than what is stored
  bool rounded;  // to the dtype before it is multiplied by the weight, too
};

}  // namespace layout
