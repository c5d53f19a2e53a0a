"""Text into the ids of a model's vocabulary and back, one file a tokenizer."""

from bminf.tokenizers.base import SentinelTokenizer, Tokenizer
from bminf.tokenizers.cpm1 import CPM1Tokenizer
from bminf.tokenizers.cpm1_word import CPM1WordTokenizer
from bminf.tokenizers.cpm2 import CPM2Tokenizer
from bminf.tokenizers.cpm2_bilingual import CPM2BilingualTokenizer
from bminf.tokenizers.eva import EVATokenizer
from bminf.tokenizers.find import find_tokenizer, tokenizer_from
from bminf.tokenizers.stream import TextStream

__all__ = [
    "CPM1Tokenizer",
    "CPM1WordTokenizer",
    "CPM2BilingualTokenizer",
    "CPM2Tokenizer",
    "EVATokenizer",
    "SentinelTokenizer",
    "TextStream",
    "Tokenizer",
    "find_tokenizer",
    "tokenizer_from",
]
