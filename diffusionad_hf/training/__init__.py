"""The trainer: `train` and its `TrainingConfig`."""

import lazy_loader

# Torch takes seconds to import.
__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__, submod_attrs={"arguments": ["TrainingConfig"], "loop": ["train"], "progress": ["Progress"]}
)
