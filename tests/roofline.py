"""roofline.py: the seconds that an H100 would take at least, for what fake_gpu.py saw. Nobody has timed any of it.

    seconds = roof(func, flops, values)        # of one kernel
    seconds = roof_of_graph(graph)             # of a compiled graph, fused where a compiler would fuse
"""
import torch
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

# Which argument of an attention kernel says that it is causal.
CAUSAL = {"_scaled_dot_product_flash_attention": 4, "_scaled_dot_product_flash_attention_backward": 11}
# What an H100 reaches: FLOP/s of matrix products by bytes a number and of attention, bytes/s of memory and of NVLink.
RATES = {2: 680e12, 4: 330e12, "attention": 300e12, "memory": 2.7e12, "link": 350e9}
LAUNCH = 2e-6   # seconds of any kernel


def nbytes(tree):
    return sum(x.numel() * x.itemsize for x in tree_leaves(tree) if torch.is_tensor(x))


def work(func, args, kwargs, out):
    """FLOPs of an operation, 0 of what is no product. torch's registry counts every key of causal attention, and one
    product of its backward a second time."""
    packet = getattr(func, "_overloadpacket", None)
    if packet not in flop_registry:
        return 0
    name = packet.__name__
    share = (0.5 if name in CAUSAL and args[CAUSAL[name]] else 1) * (0.8 if "attention_backward" in name else 1)
    return share * flop_registry[packet](*args, **kwargs, out_val=out)


def link(name, args):
    """Seconds of a collective of eight GPUs of one node."""
    return (2 if "allreduce" in name else 1) * 7 / 8 * nbytes(args) / RATES["link"]


def roof(func, flops, values):
    """Seconds of one kernel that reads and writes the tensors among `values`."""
    size = min((x.itemsize for x in tree_leaves(values) if torch.is_tensor(x) and x.is_floating_point()), default=4)
    rate = RATES["attention"] if "attention" in str(func) else RATES[min(4, max(2, size))]
    return LAUNCH + max(flops / rate, nbytes(values) / RATES["memory"])


def roof_of_graph(graph):
    """Seconds of a compiled graph: matrix products and attention one by one, whatever lies between two of them (as many
    such kernels before it, and joined by tensors) as one kernel that reads what comes in and writes what goes out."""
    seconds, depth, group, heavy = 0.0, {}, {}, set()
    for node in graph.nodes:
        depth[node] = max([depth[n] + (n in heavy) for n in node.all_input_nodes], default=0)
        if node.op != "call_function" or "val" not in node.meta:
            continue
        if getattr(node.target, "_overloadpacket", None) in flop_registry:
            heavy.add(node)
            args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
            flops = work(node.target, args, kwargs, node.meta["val"])
            seconds += roof(node.target, flops, (args, kwargs, node.meta["val"]))
            continue
        near = {group[n] for n in node.all_input_nodes if n in group and depth[n] == depth[node]}
        mine = min(near, default=len(depth))
        group.update({n: mine for n, g in group.items() if g in near})
        group[node] = mine
    for one in set(group.values()):
        inside = {n for n, g in group.items() if g == one}
        if all(getattr(n.target, "is_view", True) for n in inside):
            continue                                       # nothing is moved
        ends = {n for x in inside for n in x.all_input_nodes} - inside
        ends |= {n for n in inside if set(n.users) - inside}
        seconds += LAUNCH + sum(nbytes(n.meta.get("val")) for n in ends) / RATES["memory"]
    return seconds
