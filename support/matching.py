"""The weights of any program's DCGAN, matched to a network of this one by the order and the shapes of its tensors."""

import re

import torch

from support.errors import UserError, counted

# "ema" as a word of a name: netG_ema, emaG, generatorEMA, netGEma, but not schema.
EMA = re.compile(r"(?<![A-Za-z])ema(?![a-z])|Ema(?![a-z])|(?<![A-Z])EMA(?![A-Za-z])")
WRAPPER = re.compile(r"(?<![^.])(module|_orig_mod)\.")  # what DataParallel and torch.compile add to names


class Mismatch(Exception):
    """A state dict does not fit a network, for the reason given; `layers`: how many of its convolutions do fit."""

    def __init__(self, reason, layers=0):
        super().__init__(reason)
        self.layers = layers


def best_match(network_class, other_class, states, average):
    """Return what `match_weights` returns for the first of `states`, as `state_dicts` yields them, that matches.

    average: try those that are an average first; otherwise, those that are not. If none matches, raises the Mismatch of
    the state dict that comes nearest, not counting those that match `other_class`.
    """
    mismatches = []
    for _, state in sorted(states, key=lambda entry: entry[0] != average):
        try:
            return match_weights(network_class, state)
        except Mismatch as mismatch:
            if not has_shapes_of(other_class, state):
                mismatches.append(mismatch)
    if mismatches:
        raise max(mismatches, key=lambda mismatch: mismatch.layers)
    raise Mismatch(f"it holds a {other_class.__name__.lower()}" if states else "it holds no weights of convolutions")


def state_dicts(tree):
    """Yield (whether it is called an average, state dict) for every dictionary in `tree` with convolution weights."""
    seen, waiting = set(), [(False, tree)]
    while waiting:
        average, tree = waiting.pop()
        if not isinstance(tree, dict) or id(tree) in seen or "param_groups" in tree:  # the last is an optimizer
            continue
        seen.add(id(tree))
        waiting += [(average or is_average(key), value) for key, value in reversed(tree.items())]
        tensors = {
            str(key): t.detach() for key, t in tree.items() if isinstance(t, torch.Tensor) and is_dense_on_cpu(t)
        }
        if any(t.dim() == 4 for t in tensors.values()):
            parts = {}
            for key, t in tensors.items():
                parts.setdefault(key.split(".")[0], {})[key] = t
            if all(len(layers_of(part)[0]) >= 3 for part in parts.values()):  # both networks in one dictionary
                yield from ((average or is_average(part), state) for part, state in parts.items())
            yield average, tensors


def is_average(name):
    return bool(EMA.search(str(name)))


def is_dense_on_cpu(tensor):
    return tensor.layout == torch.strided and tensor.device.type == "cpu"


def layers_of(state):
    """Return (names of the convolutions' weights, prefixes of the batch norms' tensors), in the order of the layers."""
    convolutions = [name for name, t in state.items() if t.dim() == 4]
    norms = [name.removesuffix("running_mean") for name in state if name.endswith("running_mean")]
    return convolutions, norms


def match_weights(network_class, state):
    """Return (a `network_class` with the weights of `state`, whether their names differ from this program's).

    Layers are matched by the order and the shapes of their weights, never by their names. Raises Mismatch.
    """
    state = {name: t for name, t in state.items() if name != "n_averaged"}  # of torch.optim.swa_utils
    net = network_of_shapes(network_class, state)
    expected = net.state_dict()
    (our_convolutions, our_norms), (convolutions, norms) = layers_of(expected), layers_of(state)
    if len(norms) != len(our_norms):
        found = f"it has {counted(len(norms), 'batch norm')} with running statistics"
        raise Mismatch(f"{found}, wanted {len(our_norms)}", len(convolutions))
    theirs = dict(zip(our_convolutions, convolutions, strict=True))
    for ours, their in zip(our_norms, norms, strict=True):
        theirs |= {name: their + name.removeprefix(ours) for name in expected if name.startswith(ours)}
    tensors = {}
    for ours, their in theirs.items():
        if their not in state and ours.endswith("num_batches_tracked"):  # not in files of PyTorch before 0.4.1
            tensors[ours] = torch.tensor(0)
        else:
            tensors[ours] = tensor_of_shape(state, their, expected[ours].shape, len(convolutions))
    biases = fold_biases(tensors, state, theirs)
    known = {*theirs.values(), *biases}
    extra = [name for name in state if name not in known]
    if extra:
        raise Mismatch(f"{extra[0]} ({shape_text(state[extra[0]])}) has no place in a DCGAN", len(convolutions))
    net.load_state_dict({name: t.contiguous() for name, t in tensors.items()}, assign=True)
    plain = {ours: WRAPPER.sub("", their) for ours, their in theirs.items()}
    prefix = next(iter(plain.values())).removesuffix(next(iter(plain)))
    return net, bool(biases) or any(their != prefix + ours for ours, their in plain.items())


def network_of_shapes(network_class, state):
    """Return a `network_class` on the meta device whose convolutions have the shapes of those in `state`.

    Raises Mismatch at the first tensor that no such network has.
    """
    for name, t in state.items():
        if name.endswith(("weight_orig", "weight_g")) or "parametrizations." in name:
            raise Mismatch(f"{name} is of a spectral norm or weight norm; remove that before saving")
        if t.dim() not in (0, 1, 4):
            raise Mismatch(f"{name} has the shape {shape_text(t)}; a DCGAN has no fully connected or other layers")
        if t.dim() and not (t.numel() and t.is_floating_point()):
            raise Mismatch(f"{name} {f'has the type {t.dtype}' if t.numel() else 'is empty'}")
    convolutions, _ = layers_of(state)
    if not 3 <= len(convolutions) <= 9:
        raise Mismatch(f"it has {counted(len(convolutions), 'convolution')}, a DCGAN 3 to 9")
    doublings = len(convolutions) - 1
    sizes = network_class.arguments_from_shapes(state[convolutions[0]].shape, state[convolutions[-1]].shape, doublings)
    side = min(max(sizes["image_size"] >> doublings, 4), 7)  # any other: tensor_of_shape reports the kernel
    sizes["image_size"] = side << doublings
    try:
        with torch.device("meta"):
            net = network_class(**sizes)
    except UserError:
        size = sizes["image_size"]
        raise Mismatch(
            f"its {len(convolutions)} convolutions are for images of {size} x {size}, larger than 1024 x 1024"
        ) from None
    expected = net.state_dict()
    for layer, (ours, their) in enumerate(zip(layers_of(expected)[0], convolutions, strict=True)):
        tensor_of_shape(state, their, expected[ours].shape, layer)
    return net


def has_shapes_of(network_class, state):
    """Return whether `state` has the convolutions of a `network_class`."""
    try:
        network_of_shapes(network_class, state)
    except Mismatch:
        return False
    return True


def tensor_of_shape(state, name, shape, layers):
    """Return a tensor of `state`, which must have this shape. Raises Mismatch."""
    if name not in state:
        raise Mismatch(f"{name} is missing", layers)
    if state[name].shape != shape:
        raise Mismatch(f"{name} has the shape {shape_text(state[name])}, wanted {' x '.join(map(str, shape))}", layers)
    return state[name]


def fold_biases(tensors, state, theirs):
    """Subtract the biases of convolutions from the running means of the batch norms that follow; return their names.

    The network computes the same with them folded: in training, batch norm takes its batch's mean away, and the bias
    with it. Raises Mismatch for a bias that no batch norm follows, unless it is zero.
    """
    convolutions, _ = layers_of(tensors)
    biases = {ours: theirs[ours].removesuffix("weight") + "bias" for ours in convolutions}
    biases = {ours: name for ours, name in biases.items() if name in state}
    for ours, name in biases.items():
        mean = f"main.{int(ours.split('.')[1]) + 1}.running_mean"
        if mean in tensors:
            bias = tensor_of_shape(state, name, tensors[mean].shape, len(convolutions))
            tensors[mean] = tensors[mean].double() - bias.double()
        elif state[name].any():
            raise Mismatch(f"{name} is not zero, and no batch norm follows to fold it into", len(convolutions))
    return set(biases.values())


def shape_text(tensor):
    return " x ".join(map(str, tensor.shape)) or "one number"
