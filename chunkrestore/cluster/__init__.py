"""Where work runs: the only part that creates clusters or connects to one."""

from chunkrestore.cluster.connect import Cluster, connect
from chunkrestore.cluster.environment import THREADS_PER_WORKER, usable_cores, worker_environment
from chunkrestore.cluster.profile import read_profile

__all__ = ["THREADS_PER_WORKER", "Cluster", "connect", "read_profile", "usable_cores", "worker_environment"]
