"""Calibration sets and evaluation texts: from a name or a file to windows of token ids."""

from compressor.calibration.evaluation import EvaluationText, load_evaluation
from compressor.calibration.folders import data_folder
from compressor.calibration.load import TokenWindows, load_calibration
from compressor.calibration.overlap import SameText, same_text
from compressor.calibration.selfsample import sample_from_model
from compressor.calibration.spec import SourceSpec, named_set, set_names

__all__ = [
    "EvaluationText",
    "SameText",
    "SourceSpec",
    "TokenWindows",
    "data_folder",
    "load_calibration",
    "load_evaluation",
    "named_set",
    "same_text",
    "sample_from_model",
    "set_names",
]
