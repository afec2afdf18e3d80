"""Rows of a data set on the hub, streamed."""

from __future__ import annotations

import logging
from collections.abc import Iterator

from compressor.calibration.rows import Row
from compressor.calibration.spec import SourceSpec
from compressor.errors import UserError

log = logging.getLogger("compressor.hub")
"""Says what is read; the command line shows it where output is a log."""


def stream_rows(spec: SourceSpec) -> Iterator[Row]:
    """Yield the rows of ``spec`` in their order on the hub; only what is read is downloaded.

    Raises:
        UserError: the hub cannot be reached, or has no such set.
    """
    try:
        from datasets import load_dataset
        from huggingface_hub import HfApi

        # asked first because it fails at once without a network, where datasets tries again for half a minute
        HfApi().dataset_info(spec.path, revision=spec.revision, timeout=20)
        log.info(f"reading {spec.name} from the hub: {spec.path}@{spec.revision or 'main'}, as far as it is needed")
        rows = load_dataset(
            spec.path,
            name=spec.config,
            split=spec.split,
            data_files={spec.split: list(spec.data_files)} if spec.data_files else None,
            revision=spec.revision,
            streaming=True,
        )
        yield from rows
    except Exception as error:  # datasets, huggingface_hub, httpx, fsspec and pyarrow each have their own
        reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        raise UserError(
            f"set {spec.name!r} could not be read from the hub ({spec.path}; offline? {reason})",
            fix="use a local file (--calibration FILE), or what comes along: embedded, embedded-heldout",
        ) from error
