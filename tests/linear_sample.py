"""A linearization in which every field is filled, with numbers as they come out of small models."""

from __future__ import annotations

from compressor.report.schema_linear import (
    Agreement,
    Decode,
    DecodeRow,
    Distillation,
    DistillationPoint,
    Exactness,
    LayerScore,
    Linearization,
    LongWindows,
    PositionRow,
    Positions,
    Proof,
    Recall,
    RecallRow,
    Sample,
    Selection,
    Transfer,
    TransferPoint,
)


def transfer(layer: int, points: int) -> Transfer:
    start, end = 0.9 / (layer + 1), 0.06 / (layer + 1)
    return Transfer(
        layer=layer,
        before=start,
        after=end,
        memory_before=1.3,
        memory_after=0.31 + 0.01 * layer,
        curve=[
            TransferPoint(tokens=16384 * i, error=end + (start - end) * 0.82**i * (1 + 0.1 * (i % 3)))
            for i in range(points)
        ],
    )


def sample_proof() -> Proof:
    return Proof(
        seconds=23.4,
        exactness=Exactness(
            by_construction=True,
            tokens=64,
            texts=4,
            to_teacher=0.31,
            to_softmax=1.3e-5,
            allowed=2.2e-3,
            passed=True,
        ),
        agreement=[
            Agreement(
                way="read at once, then token by token", tokens=510, difference=1.4e-5, allowed=2.1e-3, passed=True
            ),
            Agreement(way="read in chunks of 43", tokens=510, difference=1.7e-5, allowed=2.1e-3, passed=True),
        ],
        positions=Positions(
            text="stories",
            windows=16,
            window=64,
            edges=[64, 128, 256, 511],
            tokens=[1024, 1024, 2048, 4080],
            rows=[
                PositionRow(who="teacher", whole=4.5, perplexities=[5.88, 4.49, 4.30, 4.33]),
                PositionRow(who="student", whole=4.64, perplexities=[5.89, 4.55, 4.44, 4.51]),
                PositionRow(who="window", whole=4.86, perplexities=[5.89, 4.58, 4.69, 4.95]),
                PositionRow(who="memory", whole=19.5, perplexities=[14.8, 15.3, 21.2, 27.5]),
            ],
            gain=0.0612,
            gain_stderr=0.0041,
        ),
        recall=Recall(
            passage="natural text",
            cue=8,
            target=16,
            trials=8,
            rows=[
                RecallRow(
                    distance=64 * windows,
                    windows=windows,
                    beyond_context=windows == 16,
                    who=who,
                    loss=1.5 + shift,
                    gain=gain / windows**0.5,
                    gain_stderr=0.05,
                    hits=0.45,
                    guessed=0.31,
                )
                for windows in (2, 4, 8, 16)
                for who, gain, shift in (("teacher", 0.9, 0.0), ("student", 0.6, 0.1), ("window", 0.05, 0.4))
            ],
        ),
        decode=Decode(
            device="cpu",
            dtype="float32",
            threads=1,
            steps=16,
            rows=[
                DecodeRow(context=256, teacher_ms=1.3, student_ms=1.6, teacher_bytes=327_680, student_bytes=180_352),
                DecodeRow(
                    context=1024, teacher_ms=1.6, student_ms=1.65, teacher_bytes=1_310_720, student_bytes=376_960
                ),
                DecodeRow(
                    context=4096, teacher_ms=3.9, student_ms=2.1, teacher_bytes=5_242_880, student_bytes=1_163_392
                ),
            ],
            skipped=[16384],
            state_bytes=28_676,
            teacher_bytes_per_token=1280.0,
            student_bytes_per_token=256.0,
            smaller_from=113,
            faster_from=4096,
        ),
        samples=[
            Sample(
                prompt="Once upon a time, there was a little girl named",
                teacher=" Lily. She loved to play with her toys.\nOne day, she went to the park with her mom.",
                student=" Lily. She loved to play with her toys.\nOne day, she saw a little bird.",
                same=17,
            )
        ],
        left_out=["nothing of weight"],
    )


def sample_linearization(points: int = 3) -> Linearization:
    """``points``: of each curve."""
    return Linearization(
        method="windowed",
        mixer={
            "method": "windowed",
            "window": 64,
            "sinks": 4,
            "join": "shared",
            "features": 8,
            "map": "hedgehog",
            "decay": "scalar",
        },
        own_code=True,
        linearized=[0, 1, 3, 4],
        kept=[2],
        selection=Selection(
            rule="kl-add",
            meaning="KL to the teacher that keeping the layer takes away, nats per token",
            tokens=16384,
            scores=[LayerScore(layer=layer, score=0.01 * (1 + (layer * 3) % 5)) for layer in range(5)],
        ),
        transfer=[transfer(layer, points) for layer in (0, 1, 3, 4)],
        distillation=Distillation(
            trained="low-rank updates of q, k, v, o, and what is new",
            parameters=12_345,
            tokens=500_000,
            teacher="the 64 largest predictions of the teacher for each token, on disk",
            stored_bytes=25_165_824,
            longer=LongWindows(tokens=100_000, seqlen=2048, windows=48, batch=2, sha256="0" * 64),
            curve=[
                DistillationPoint(
                    tokens=8192 * i,
                    kl=0.02 + 0.3 * 0.9**i,
                    ce=1.5 + 0.4 * 0.93**i,
                    stage=2 if 5 * i < 4 * points else 3,
                )
                for i in range(points)
            ],
        ),
        proof=sample_proof(),
    )
