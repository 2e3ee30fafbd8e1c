"""Mapping tables: which token of a control model's vocabulary stands for each token of a target's."""

from trimtab_mappings.building import build_table, cached_table
from trimtab_mappings.decoding import VocabularyError
from trimtab_mappings.encoder import ByteEncoder
from trimtab_mappings.growing import GrowingEncoding
from trimtab_mappings.loading import load_encoder, load_tokenizer, load_vocabulary
from trimtab_mappings.pm_mined import nearest
from trimtab_mappings.strategies import STRATEGIES, Strategy
from trimtab_mappings.table import Coverage, Kind, MappingTable, TableError
from trimtab_mappings.vocabulary import ROLES, Vocabulary, read_vocabulary

__all__ = [
    "ROLES",
    "STRATEGIES",
    "ByteEncoder",
    "Coverage",
    "GrowingEncoding",
    "Kind",
    "MappingTable",
    "Strategy",
    "TableError",
    "Vocabulary",
    "VocabularyError",
    "build_table",
    "cached_table",
    "load_encoder",
    "load_tokenizer",
    "load_vocabulary",
    "nearest",
    "read_vocabulary",
]
