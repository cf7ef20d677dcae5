"""Quiet about kernels that these tests do without."""

try:
    import transformers
except ImportError:
    pass  # each test file skips, and says so
else:
    transformers.logging.set_verbosity_error()
