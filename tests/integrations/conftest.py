"""Quiet about kernels that these tests do without; one thread, since more only wait for each other in small models."""

try:
    import torch
    import transformers
except ImportError:
    pass  # each test file skips, and says so
else:
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
