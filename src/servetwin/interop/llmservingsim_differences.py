"""Where a scenario departs from what LLMServingSim 2.0 would do with the same cluster file, and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from servetwin.interop.llmservingsim_bench import Bench
from servetwin.interop.llmservingsim_cluster import Cluster
from servetwin.interop.llmservingsim_engine import Model
from servetwin.interop.llmservingsim_links import Links
from servetwin.interop.llmservingsim_options import Flags
from servetwin.interop.llmservingsim_replicas import Replica


def differences(
    cluster: Cluster,
    replicas: Sequence[Replica],
    models: Mapping[str, Model],
    given: Flags,
    links: Links,
    run: Bench | None,
) -> list[str]:
    """A sentence or two for each; a departure that changes nothing for this cluster is left out."""
    found = []
    first = cluster.instances[0]
    groups = [replica for replica in replicas if replica.first.group is not None]
    experts = [replica for replica in replicas if models[replica.first.model].experts]
    if links.guessed:
        near = links.inside.section()
        found.append(
            "Links: the file's 16 GB/s and 20 us are a guess; what that project measured later on this hardware "
            f"(PCIe 5, collectives inside CUDA graphs) is used, {near['bandwidth']} and {near['latency']}."
        )
    if len({replica.first.tensor for replica in replicas}) > 1:
        found.append("Tensor degrees: each pool has its own; that project gives all instances their mean.")
    if len(groups) > 1 or (groups and len(groups) < len(replicas)):
        found.append(
            "Data-parallel groups: each has its own network; that project makes the network of the first group alone, "
            "and fails or hangs on the rest."
        )
    if len(set(cluster.hosts)) > 1:
        found.append("Host memory: each node has its own; that project takes the first node's speed for all.")
    speeds = {instance.memory_bandwidth for instance in cluster.instances}
    if len(speeds) > 1:
        found.append("Device memory: each pool has its own speed; that project takes one for all.")
    for replica in groups:
        if len(replica.members) > 1 and not models[replica.first.model].experts:
            found.append(
                f"{replica.first.model}: vLLM steps the data-parallel ranks of a dense model each for itself; that "
                "project holds them in step and pads their batches."
            )
            break
    for replica in experts:
        tensor, data = replica.first.tensor, len(replica.members)
        if replica.expert == 1 and tensor > 1:
            found.append(
                "ep_size 1: every expert is split over the tensor ranks; that project runs whole experts on the first."
            )
        elif 1 < replica.expert < tensor * data:
            found.append(
                f"ep_size {replica.expert} on {tensor * data} ranks: every expert is split over the ranks that are "
                "left; that project leaves those idle. (vLLM itself spreads experts over all ranks or none.)"
            )
        elif replica.expert > 1 and data == 1:
            found.append(
                "Expert parallelism over tensor ranks alone ends in an all-reduce, as in vLLM; that project prices an "
                "all-gather and a reduce-scatter, and more token-expert pairs than a rank has."
            )
    if experts and given.expert_routing == "RR":
        found.append(
            "--expert-routing-policy RR: an even share, as its name says (balanced); that project sends every token to "
            "the first experts."
        )
    if experts and given.expert_routing == "RAND":
        found.append(
            "--expert-routing-policy RAND: drawn anew for every step and layer; that project draws the same every step."
        )
    if run is not None and run.data > 1:
        ignored = f" (--request-routing-policy {given.routing} has no part in it)" if given.routing != "LOAD" else ""
        found.append(f"Requests go to data-parallel ranks as vLLM's own front end sends them{ignored}.")
    if len({instance.model for instance in cluster.instances}) > 1:
        found.append(
            f"Models: the workload names none, so its requests are for {first.model}, and only pools that serve it get "
            "any; that project sends them to instances of any model."
        )
    return list(dict.fromkeys(found))
