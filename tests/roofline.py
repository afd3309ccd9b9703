"""The least seconds that an H100 would take for what fake_gpu.py saw. Nobody has timed any of it.

    seconds = roof(func, flops, values)         # of one kernel
    seconds = roof_of_graph(graph)              # of a compiled graph, fused as a compiler would
"""
import torch
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

# Which argument of an attention kernel says that it is causal
CAUSAL = {"_scaled_dot_product_flash_attention": 4,
          "_scaled_dot_product_flash_attention_backward": 11}
# What an H100 reaches: FLOP/s of matrix products by bytes a number, and of attention; bytes/s
RATES = {2: 680e12, 4: 330e12, "attention": 300e12, "memory": 2.7e12, "link": 350e9}
LAUNCH = 2e-6   # seconds of any kernel


def nbytes(tree):
    return sum(x.nbytes for x in tree_leaves(tree) if torch.is_tensor(x))


def work(func, args, kwargs, out):
    """FLOPs of an operation; 0 unless it multiplies matrices.

    torch's registry counts all keys of causal attention, and one product of the backward pass
    twice. Both are corrected."""
    packet = getattr(func, "_overloadpacket", None)
    if packet not in flop_registry:
        return 0
    name = packet.__name__
    share = 1.0
    if name in CAUSAL and args[CAUSAL[name]]:
        share *= 0.5
    if "attention_backward" in name:
        share *= 0.8
    return share * flop_registry[packet](*args, **kwargs, out_val=out)


def link(name, args):
    """Seconds of a collective of eight GPUs of one node."""
    passes = 2 if "allreduce" in name else 1
    return passes * 7 / 8 * nbytes(args) / RATES["link"]


def roof(func, flops, values):
    """Seconds of one kernel that reads and writes the tensors among `values`."""
    tensors = [x for x in tree_leaves(values) if torch.is_tensor(x)]
    size = min([x.itemsize for x in tensors if x.is_floating_point()], default=4)
    rate = RATES[min(4, max(2, size))]
    if "attention" in str(func):
        rate = RATES["attention"]
    return LAUNCH + max(flops / rate, nbytes(tensors) / RATES["memory"])


def roof_of_graph(graph):
    """Seconds of a compiled graph. Matrix products and attention are kernels of their own. What
    lies between two of them is one kernel, which reads what comes in and writes what goes out:
    operations joined by tensors, with the same number of products before them."""
    seconds = 0.0
    depth = {}                  # node -> products before it
    products = set()
    group = {}                  # node -> number of the kernel that it belongs to
    for node in graph.nodes:
        before = [depth[other] + (other in products) for other in node.all_input_nodes]
        depth[node] = max(before, default=0)
        if node.op != "call_function" or "val" not in node.meta:
            continue
        if getattr(node.target, "_overloadpacket", None) in flop_registry:
            products.add(node)
            inputs = torch.fx.map_arg((node.args, node.kwargs), lambda other: other.meta["val"])
            out = node.meta["val"]
            flops = work(node.target, *inputs, out)
            seconds += roof(node.target, flops, (inputs, out))
        else:
            join(node, group, depth)
    for number in set(group.values()):
        seconds += seconds_of_fusion({node for node in group if group[node] == number})
    return seconds


def join(node, group, depth):
    """Put the node into the group of its inputs, and make their groups one."""
    near = {group[other] for other in node.all_input_nodes
            if other in group and depth[other] == depth[node]}
    number = min(near, default=len(depth))
    for other in group:
        if group[other] in near:
            group[other] = number
    group[node] = number


def seconds_of_fusion(inside):
    """Seconds of the operations `inside`, as one kernel."""
    if all(getattr(node.target, "is_view", True) for node in inside):
        return 0.0                                      # nothing is moved
    ends = set()                                        # what comes in and what goes out
    for node in inside:
        ends.update(set(node.all_input_nodes) - inside)
        if set(node.users) - inside:
            ends.add(node)
    return LAUNCH + sum(nbytes(node.meta.get("val")) for node in ends) / RATES["memory"]
