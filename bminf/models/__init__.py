"""The zoo: text in, text out."""

from bminf.models.assemble import plan_model
from bminf.models.base import LanguageModel
from bminf.models.bloom import BLOOM
from bminf.models.convert import convert
from bminf.models.cpm1 import CPM1
from bminf.models.glm import GLM, Answer, plan_glm
from bminf.models.options import GLMOptions, Options
from bminf.models.stats import ModelStats
from bminf.models.t5 import CPM2, EVA
from bminf.models.text import TextIterator

__all__ = [
    "BLOOM",
    "CPM1",
    "CPM2",
    "EVA",
    "GLM",
    "Answer",
    "GLMOptions",
    "LanguageModel",
    "ModelStats",
    "Options",
    "TextIterator",
    "convert",
    "plan_glm",
    "plan_model",
]
