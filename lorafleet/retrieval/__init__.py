"""Which rows of the corpora are nearest to a query.

Reads from top to bottom: `encoder` (texts to unit vectors), `server` (the Chroma server of this machine), `index` (the rows
in Chroma: written, counted, searched), `manifest` (what the index was made from). Only this room knows Chroma.
"""

from lorafleet.retrieval.encoder import Encoder, Vectors
from lorafleet.retrieval.index import CorpusIndex, Entry, Neighbour, open_for_writing, open_index, row_identifiers
from lorafleet.retrieval.manifest import Manifest, read_manifest, write_manifest

__all__ = [
    "CorpusIndex",
    "Encoder",
    "Entry",
    "Manifest",
    "Neighbour",
    "Vectors",
    "open_for_writing",
    "open_index",
    "read_manifest",
    "row_identifiers",
    "write_manifest",
]
