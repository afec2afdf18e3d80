"""What an export does when a fresh process computes something else from it, or when there is no room to try."""

from __future__ import annotations

from pathlib import Path

import integer_models
import pytest
import repacked
import torch
from foreign import need_package
from integer_models import rounded
from torch import Tensor

from compressor.engine.skeleton import Skeleton
from compressor.errors import UserError
from compressor.run import export_check
from compressor.run.export_dense import export_dense
from compressor.run.export_mlx import export_mlx


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Integers. Not to be written to."""
    folder = tmp_path_factory.mktemp("packed")
    source = integer_models.source(folder / "source")
    return repacked.repack(source, folder / "packed", lambda _, weight: rounded(weight, bits=4, group=32))


@pytest.fixture
def others(monkeypatch: pytest.MonkeyPatch) -> None:
    """The packed folder seems to compute something else."""
    real = export_check._expected

    def shifted(skeleton: Skeleton) -> tuple[Tensor, Tensor]:
        ids, logits = real(skeleton)
        return ids, logits.roll(1, dims=-1)

    monkeypatch.setattr(export_check, "_expected", shifted)


@pytest.mark.usefixtures("others")
def test_other_logits_are_an_error_and_nothing_is_published(packed: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"computes other logits from the export .* nothing was published"):
        export_dense(str(packed), tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("others")
def test_mlx_may_differ_but_this_is_told(packed: Path, tmp_path: Path) -> None:
    need_package("mlx")
    need_package("mlx_lm")
    (way,) = export_mlx(str(packed), tmp_path / "out").runtimes
    assert not way.passed and way.difference is not None and way.allowed is not None and way.difference > way.allowed
    card = (tmp_path / "out" / "README.md").read_text()
    assert "mlx_lm.generate --model PATH" in card and "With mlx-lm" not in card


def test_without_a_report_the_card_still_says_what_has_loaded_it(packed: Path, tmp_path: Path) -> None:
    (way,) = export_dense(str(packed), tmp_path / "out").runtimes
    assert way.passed and way.form == "dense" and way.difference is not None
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"With transformers ({way.version}); checked: logits of 64 tokens in a fresh process." in card
    assert card.count('from_pretrained("PATH")') == 2


def test_without_room_nothing_is_tried(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_check, "available_memory", lambda: 10**6)
    monkeypatch.setattr(export_check, "start", lambda: pytest.fail("a process was started"))
    assert export_dense(str(packed), tmp_path / "out").runtimes == ()
    assert export_check.check_by_mlx(packed, tmp_path / "out", "") == []


def test_what_rounding_is_allowed(packed: Path) -> None:
    from compressor.engine.checkpoint import open_checkpoint
    from compressor.engine.skeleton import build_skeleton
    from compressor.run.verify import TOLERANCE

    assert export_check._rounding(build_skeleton(open_checkpoint(packed))) == TOLERANCE[torch.float32]
