"""Where tests of foreign programs find what they need; see :mod:`promised`."""

from __future__ import annotations

from foreign import PROMISED, absent, need_package

__all__ = ["PROMISED", "absent", "need_package"]
