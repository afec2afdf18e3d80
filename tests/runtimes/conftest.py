"""What the tests of other programs share is in ``foreign.py``: every folder has a ``conftest``, so that none can be
imported by that name when all tests run together."""

from foreign import absent, need_package

__all__ = ["absent", "need_package"]
