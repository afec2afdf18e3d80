"""The maths of compression: tensors in, tensors out. Knows no model, no file and no command line.

Begin with ``table.py``: the methods by name, and ``solve``. Nothing is imported here, so that ``settings`` comes cheap.
"""
