"""Text into the ids of a model's vocabulary and back, one file a tokenizer."""

from bminf.tokenizers.base import GLMTokenizer, SentinelTokenizer, TextStream, Tokenizer
from bminf.tokenizers.bloom import BloomTokenizer
from bminf.tokenizers.cog_pretrain import CogPretrainTokenizer
from bminf.tokenizers.cpm1 import CPM1Tokenizer, CPM1WordTokenizer
from bminf.tokenizers.cpm2 import CPM2BilingualTokenizer, CPM2Tokenizer
from bminf.tokenizers.eva import EVATokenizer
from bminf.tokenizers.find import find_tokenizer, tokenizer_from
from bminf.tokenizers.gpt2 import GPT2Tokenizer
from bminf.tokenizers.icetk import IcetkPackageTokenizer, IceTokenizer
from bminf.tokenizers.stop_strings import StopStrings

__all__ = [
    "BloomTokenizer",
    "CPM1Tokenizer",
    "CPM1WordTokenizer",
    "CPM2BilingualTokenizer",
    "CPM2Tokenizer",
    "CogPretrainTokenizer",
    "EVATokenizer",
    "GLMTokenizer",
    "GPT2Tokenizer",
    "IceTokenizer",
    "IcetkPackageTokenizer",
    "SentinelTokenizer",
    "StopStrings",
    "TextStream",
    "Tokenizer",
    "find_tokenizer",
    "tokenizer_from",
]
