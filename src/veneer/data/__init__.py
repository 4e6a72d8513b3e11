"""From a file, a folder, a sample or a hub data set to batches of tokens.

`load_task` is the entry point. Nothing heavy is imported before a function here is called.
"""

from veneer.data.batches import Collator, Prompt, TaskData
from veneer.data.classification import display_name
from veneer.data.files import read_rows, read_table
from veneer.data.preview import preview, preview_text
from veneer.data.table import Table
from veneer.data.tasks import encode_prompts, encode_texts, load_evaluation, load_task

__all__ = [
    "Collator",
    "Prompt",
    "Table",
    "TaskData",
    "display_name",
    "encode_prompts",
    "encode_texts",
    "load_evaluation",
    "load_task",
    "preview",
    "preview_text",
    "read_rows",
    "read_table",
]
