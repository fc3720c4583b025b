"InternLM's training system as notebooks: see nbs/ for the text that makes this package."
__version__ = "0.1.0"
