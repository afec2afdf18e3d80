"""A report in which every field is filled."""

from __future__ import annotations

from linear_sample import sample_linearization

from compressor.report.schema import (
    Baseline,
    Calibration,
    Evaluation,
    EvaluationRow,
    Expert,
    KernelCost,
    Layer,
    LedgerRow,
    Memory,
    Model,
    Report,
    Resumed,
    Size,
    Timing,
    Tool,
    Verification,
)
from compressor.report.schema_chain import EarlierRun, StageResult
from compressor.report.schema_use import Exported, Runtime, Sample, TaskResult


def _stage(label: str, number: int) -> StageResult:
    return StageResult(
        label=label,
        matrices=6 + number,
        bytes=700_000 + number,
        bits_per_weight=8.0 + number,
        sparsity=0.4 + number / 100,
        relative_error=0.02 * number,
    )


def full_report(blocks: int = 3, *, linearized: bool = False, exported: bool = False) -> Report:
    """Every optional field is set but those of linearized models and of exports, every list has an entry."""
    names = [f"model.layers.{block}.{part}" for block in range(blocks) for part in ("self_attn.q_proj", "mlp.up_proj")]
    layers = [
        Layer(
            name=name,
            block=index // 2,
            kind=name.split(".", 3)[-1],
            shape=(384, 128),
            method="sparsegpt",
            format="bitmask",
            sparsity=0.5 + 0.01 * index,
            bits_per_weight=9.0,
            bytes=55_296,
            relative_error=0.01 * (index + 1),
            tokens=4096,
            seconds=0.25,
            component="LRC",
            notes=["two inputs were always zero"] if index == 0 else [],
            rungs=["damping 0.01 -> 0.1"] if index == 0 else [],
            fallback="magnitude, no tokens" if index == 0 else None,
        )
        for index, name in enumerate(names)
    ]
    return Report(
        linearization=sample_linearization() if linearized else None,
        tool=Tool(version="0.1.0", command="compressor prune toy -o out", started="2026-01-02T03:04:05Z", seconds=12.5),
        model=Model(
            source="toy",
            revision="4bd0c1a7",
            model_type="llama",
            architecture="LlamaForCausalLM",
            blocks=blocks,
            parameters=900_000,
            linear_parameters=700_000,
            dtype="bfloat16",
            tied_embeddings=True,
            vocabulary=512,
        ),
        recipe={"stages": [{"prune": {"method": "sparsegpt", "sparsity": 0.5}}]},
        calibration=Calibration(
            sources=[{"spec": "math.jsonl", "weight": 1.0}],
            nsamples=32,
            seqlen=128,
            seed=7,
            tokens=4096,
            sha256="c0ffee" * 10,
        ),
        size=Size(
            source_bytes=1_800_000,
            output_bytes=941_400,
            weights_bytes=940_000,
            disk_bytes=990_000,
            bits_per_weight_linears=9.0,
            bits_per_weight_model=9.7,
            kv_bytes_per_token=192,
            source_kv_bytes_per_token=256,
            source_bits_per_weight=16.0,
            source_stored_parameters=900_000,
            ledger=[
                LedgerRow(
                    group="compressed linears",
                    format="bitmask",
                    tensors=6,
                    parameters=700_000,
                    stored_parameters=700_000,
                    bytes=787_500,
                    source_bytes=1_400_000,
                    bits_per_weight=9.0,
                    share=0.80,
                ),
                LedgerRow(group="container", format="headers", bytes=1_400, source_bytes=900, share=0.2),
            ],
        ),
        layers=layers,
        evaluation=[
            Evaluation(
                name="stories",
                protocol={"seqlen": 256, "stride": 256, "bos": "none"},
                text_sha256="aaaa1111",
                tokens_sha256="bbbb2222",
                windows=20,
                tokens=5100,
                in_domain=False,
                in_domain_reason="calibrated on math",
                rows=[
                    EvaluationRow(who="dense", label="toy", perplexity=12.3, bits_per_byte=0.91),
                    EvaluationRow(
                        who="compressed",
                        label="sparsegpt 50 %",
                        perplexity=14.1,
                        bits_per_byte=0.96,
                        kl=0.081,
                        top1=0.87,
                        nll_per_window_stderr=0.02,
                    ),
                    EvaluationRow(
                        who="baseline", label="rounding", perplexity=15.9, bits_per_byte=1.0, kl=0.2, top1=0.8
                    ),
                ],
            )
        ],
        baseline=Baseline(
            label="8-bit round-to-nearest", bits_per_weight=8.25, bytes=930_000, verdict="Better than.", better=False
        ),
        verification=Verification(
            passed=True,
            mode="whole model",
            route="import compressor",
            max_abs_difference=0.25,
            tokens=64,
            seconds=3.5,
            kernels=KernelCost(
                rung="avx512",
                activations="int8",
                layers={"avx512": 6},
                text="stories",
                windows=4,
                seqlen=256,
                exact_perplexity=14.08,
                perplexity=14.13,
                kl=0.0004,
                top1=0.97,
                prompt_perplexity=14.12,
                prompt_kl=0.0003,
                prompt_top1=0.98,
                seconds=0.5,
            ),
            kernels_skipped="they were busy",
        ),
        runtimes=[
            Runtime(
                name="stock transformers",
                version="transformers 5.23",
                form="dense",
                command="AutoModelForCausalLM.from_pretrained(PATH)",
                language="python",
                check="largest difference of a logit on 64 tokens",
                difference=1e-5,
                allowed=1e-3,
                passed=True,
            )
        ],
        tasks=[
            TaskResult(
                task="arc_easy",
                metric="acc_norm",
                value=0.61,
                stderr=0.013,
                chance=0.25,
                corrected=0.48,
                base=0.66,
                difference_stderr=0.021,
                p=0.017,
                verdict="the loss is more than chance makes.",
                samples=200,
                total=2376,
                shots=3,
                output_type="multiple_choice",
                harness="0.4.13",
                tokens_sha256="9999eeee",
            ),
            TaskResult(
                task="knowledge",
                members=["geography", "history"],
                metric="acc",
                value=0.41,
                stderr=0.015,
                chance=0.2,
                corrected=0.2625,
                base=0.43,
                difference_stderr=0.022,
                p=0.36,
                verdict="no more than chance makes.",
                samples=60,
                total=90,
                shots=2,
                output_type="group",
                harness="0.4.12",
                tokens_sha256="8888dddd",
            ),
        ],
        samples=[
            Sample(
                prompt="Once there was",
                dense="a small house by the river.",
                compressed="a small boat by the river.",
            )
        ],
        samples_skipped="there was no time for more",
        exported=Exported(
            form="gguf Q4_0",
            file_bytes=345_678,
            disk_bytes=350_000,
            bits_per_weight_linears=4.5,
            bits_per_weight_model=5.1,
            exact=False,
            notes=["lm_head is rounded to 8 bits"],
            files=["report.json", "toy-Q4_0.gguf"],
            source="toy-pruned",
            made_for="For llama.cpp.",
            library="transformers",
            tag="gguf",
        )
        if exported
        else None,
        stages=[_stage("sparsegpt 50 %", 1), _stage("rtn 4 bits", 2)],
        history=[
            EarlierRun(
                source="toy-original",
                label="42 linears by wanda",
                stages=[_stage("wanda 30 %", 3)],
                version="0.0.9",
                command="compressor prune toy-original -o toy",
                started="2026-01-01T00:00:00Z",
                seconds=33.5,
                source_bytes=2_400_000,
                output_bytes=1_800_000,
                bits_per_weight_linears=12.5,
                bits_per_weight_model=13.5,
                source_bits_per_weight=17.5,
                sparsity=0.31,
                evaluation=[
                    Evaluation(
                        name="tales",
                        protocol={"seqlen": 128},
                        text_sha256="dddd4444",
                        tokens_sha256="eeee5555",
                        windows=11,
                        tokens=1397,
                        in_domain=False,
                        in_domain_reason="calibrated on recipes",
                        rows=[
                            EvaluationRow(who="dense", label="toy-original", perplexity=11.1, bits_per_byte=0.88),
                            EvaluationRow(
                                who="compressed",
                                label="wanda 30 %",
                                perplexity=12.4,
                                bits_per_byte=0.92,
                                kl=0.07,
                                top1=0.9,
                                nll_per_window_stderr=0.03,
                            ),
                        ],
                    )
                ],
                baseline="Worse than rounding.",
            )
        ],
        timings=[Timing(what="solve", seconds=8.5)],
        memory=Memory(peak_rss_bytes=700_000_000, peak_device_bytes=300_000_000, predicted_bytes=650_000_000),
        versions={"torch": "2.13.0"},
        machine={"cores": 2},
        seeds={"calibration": 7},
        threads=2,
        resumed=Resumed(blocks=2, times=3),
        experts=[Expert(module="model.layers.0.mlp", expert=5, tokens=17, fallback="magnitude for want of tokens")],
        carried_over=["mtp.fc.weight"],
        warnings=["the disk is nearly full"],
        fallbacks=["layer 0 was pruned by magnitude"],
    )
