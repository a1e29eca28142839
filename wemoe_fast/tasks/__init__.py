"""Tasks: a name, a classification head, samples to evaluate on and samples to adapt to.

From files (see `load_tasks`): JSONL or Parquet with text and label, a folder of images by class or Parquet with
images, or a safetensors file of ready model inputs. From Python: any object with ``__len__`` and
``batch(indices)`` is a data set (see `Samples`), and a function that returns a `Task` is an entry point
(``entry: my_module:my_task`` in tasks.yaml; the module is looked for where Python looks and beside tasks.yaml).
docs/evaluation.md has one in twenty lines.
"""

from __future__ import annotations

from .head import POOLINGS, Head
from .images import IMAGE_SUFFIXES, ImageFolderSamples
from .loading import load_tasks
from .parquet import read_parquet
from .processors import load_image_processor, load_tokenizer
from .task import DEFAULT_BATCH_SIZE, Samples, Task
from .tensors import TensorSamples
from .texts import TextSamples

__all__ = [
    "DEFAULT_BATCH_SIZE",
    "IMAGE_SUFFIXES",
    "POOLINGS",
    "Head",
    "ImageFolderSamples",
    "Samples",
    "Task",
    "TensorSamples",
    "TextSamples",
    "load_image_processor",
    "load_tasks",
    "load_tokenizer",
    "read_parquet",
]
