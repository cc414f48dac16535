"""What of a row is embedded when its neighbours are looked for: any form of its text, as people leave much of it out."""

from lorafleet.config import TextForm as QueryForm
from lorafleet.tasks.forms import FORMS, row_text
from lorafleet.tasks.forms import text_in_form as query_text

__all__ = ["FORMS", "QueryForm", "query_text", "row_text"]
