"""compressor: make Hugging Face causal language models smaller and faster, and know what it cost.

Importing this package teaches ``transformers`` to read what it writes: after ``import compressor``,
``AutoModelForCausalLM.from_pretrained(folder)`` returns the ordinary model class with packed layers.
"""

__version__ = "0.1.0"
