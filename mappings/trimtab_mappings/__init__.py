"""Mapping tables: which token of a control model's vocabulary stands for each token of a target's."""

from trimtab_mappings.encoder import ByteEncoder, load_encoder
from trimtab_mappings.pm_mined import match
from trimtab_mappings.table import Coverage, MappingTable, TableError, build_table, cached_table
from trimtab_mappings.vocabulary import (
    ROLES,
    Vocabulary,
    VocabularyError,
    load_tokenizer,
    load_vocabulary,
    read_vocabulary,
)

__all__ = [
    "ROLES",
    "ByteEncoder",
    "Coverage",
    "MappingTable",
    "TableError",
    "Vocabulary",
    "VocabularyError",
    "build_table",
    "cached_table",
    "load_encoder",
    "load_tokenizer",
    "load_vocabulary",
    "match",
    "read_vocabulary",
]
