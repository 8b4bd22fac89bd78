"""What a run tells about itself: metrics, progress, status, profiles, plots, and which rank was lost.

Importing this package imports neither torch nor any logger: each is imported where it is first used.
"""

from rung.observe.clock import Stopwatch
from rung.observe.console import ConsoleConfig, Progress, human_count, human_seconds
from rung.observe.garbage import GarbageCollector, GarbageConfig
from rung.observe.heartbeat import Failure, Heartbeat, HeartbeatConfig, RankLost
from rung.observe.memory import MemoryConfig, MemorySettings, explain_out_of_memory, suggest
from rung.observe.metrics import Logger, LoggingConfig, MetricsLog, StepMetrics, WandbConfig, read_metrics
from rung.observe.plotting import plot
from rung.observe.profiler import ProfileConfig, Profiler
from rung.observe.runs import RunSummary, list_runs, runs_table
from rung.observe.signals import StopSignals, agree
from rung.observe.status import Status, read_status, write_status
from rung.observe.throughput import memory_gib, model_flops_utilization, peak_flops, tokens_per_second

__all__ = [
    "ConsoleConfig",
    "Failure",
    "GarbageCollector",
    "GarbageConfig",
    "Heartbeat",
    "HeartbeatConfig",
    "Logger",
    "LoggingConfig",
    "MemoryConfig",
    "MemorySettings",
    "MetricsLog",
    "ProfileConfig",
    "Profiler",
    "Progress",
    "RankLost",
    "RunSummary",
    "Status",
    "StepMetrics",
    "StopSignals",
    "Stopwatch",
    "WandbConfig",
    "agree",
    "explain_out_of_memory",
    "human_count",
    "human_seconds",
    "list_runs",
    "memory_gib",
    "model_flops_utilization",
    "peak_flops",
    "plot",
    "read_metrics",
    "read_status",
    "runs_table",
    "suggest",
    "tokens_per_second",
    "write_status",
]
