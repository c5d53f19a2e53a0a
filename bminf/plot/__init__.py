"""Pictures of plans, and of what came of them: each function returns a Figure of matplotlib.

Needs `pip install "bminf[plot]"`. Figures know nothing of pyplot and need no display; they are
`width_cm` wide and have `dark` or light colours, which people who see fewer colours tell apart.
"""

from bminf.offload.predict import simulate
from bminf.offload.recording import Recording
from bminf.offload.trace import Span, Trace
from bminf.plot.experts import expert_hits
from bminf.plot.memory import memory_over_time
from bminf.plot.plans import plan_map
from bminf.plot.saving import save
from bminf.plot.speed import predicted_speeds, speed_by_limit
from bminf.plot.timelines import timeline

__all__ = [
    "Recording",
    "Span",
    "Trace",
    "expert_hits",
    "memory_over_time",
    "plan_map",
    "predicted_speeds",
    "save",
    "simulate",
    "speed_by_limit",
    "timeline",
]
