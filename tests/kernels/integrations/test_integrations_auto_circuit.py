"""The drop-in reads of auto-circuit, on a stand-in with the names and the order of calls that the adapter uses.

Its own wrapper is tested too where it is installed. bench/integrations runs the package itself.
"""

import contextlib
import importlib
import importlib.util

import pytest
import torch

from eap_kernels.integrations import auto_circuit
from tests.kernels.integrations.stand_ins import DEVICES, install

WRAPPER = """
def sample_hard_concrete(mask, batch_size, mask_expanded=False):
    mask = mask if mask_expanded else mask.repeat(batch_size, *[1] * mask.ndim)
    return (mask + torch.rand_like(mask) - 0.5).clamp(0, 1)

class PatchWrapperImpl(torch.nn.Module):
    def __init__(self, module_name, module, head_dim=None, seq_dim=None, is_src=False, src_idxs=None, is_dest=False,
                 patch_mask=None, in_srcs=None):
        super().__init__()
        self.module, self.head_dim, self.seq_dim = module, head_dim, seq_dim
        self.is_src, self.src_idxs, self.is_dest, self.in_srcs = is_src, src_idxs, is_dest, in_srcs
        self.patch_mask = None if patch_mask is None else torch.nn.Parameter(patch_mask)
        self.curr_src_outs = self.patch_src_outs = self.mask_fn = self.batch_size = None
        self.dropout_layer, self.patch_mode = torch.nn.Dropout(0.0), False
        self.dims = "d1" if seq_dim is None else "seq"

    def forward(self, *args, **kwargs):
        x = args[0].clone()
        if self.patch_mode and self.is_dest:
            d = self.patch_src_outs[self.in_srcs] - self.curr_src_outs[self.in_srcs]
            mask, batch = self.patch_mask, "batch" if self.batch_size is not None else ""
            if self.mask_fn == "hard_concrete":
                mask, batch = sample_hard_concrete(mask, x.size(0), self.batch_size is not None), "batch"
            elif self.mask_fn == "sigmoid":
                mask = torch.sigmoid(mask)
            head = "" if self.head_dim is None else "dest"
            seq = "" if self.seq_dim is None else "seq"
            expression = f"{batch} {seq} {head} src, src batch {self.dims} ... -> batch {self.dims} {head} ..."
            x = x + einsum(self.dropout_layer(mask), d, expression)
        out = self.module(x, *args[1:], **kwargs)
        if self.patch_mode and self.is_src:
            rows = out[None] if self.head_dim is None else torch.stack(out.unbind(self.head_dim))
            self.curr_src_outs[self.src_idxs] = rows
        return out
"""
PACKAGES = ["stand-in", *(["installed"] if importlib.util.find_spec("auto_circuit") else [])]


@pytest.fixture(params=PACKAGES)
def wrapper(request, monkeypatch):
    """The class PatchWrapperImpl."""
    if request.param == "stand-in":
        install(monkeypatch, auto_circuit__utils__patch_wrapper=WRAPPER)
    return importlib.import_module("auto_circuit.utils.patch_wrapper").PatchWrapperImpl


class Model(torch.nn.Module):
    """Two layers of two heads and one more node, over a residual stream, with every node wrapped; D = 3."""

    def __init__(self, wrapper, positions=None):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        seq, seq_dim = ([], None) if positions is None else ([positions], 1)

        def wrap(is_src=None, seen=None, heads=0):
            shape = [*seq, *([heads] if heads else []), seen or 0]
            mask = None if seen is None else torch.rand(shape, generator=generator, dtype=torch.float64) - 0.2
            head_dim = 2 if heads or (is_src and is_src.stop - is_src.start > 1) else None
            return wrapper(
                *("node", torch.nn.Identity(), head_dim, seq_dim, is_src is not None, is_src),
                *(seen is not None, mask, None if seen is None else slice(0, seen)),
            )

        self.start = wrap(slice(0, 1))
        self.q = torch.nn.ModuleList(wrap(seen=1 + 3 * i, heads=2) for i in range(2))
        self.z = torch.nn.ModuleList(wrap(slice(1 + 3 * i, 3 + 3 * i)) for i in range(2))
        # One module that reads and writes, as a block's own wrapper may.
        self.mlp = torch.nn.ModuleList(wrap(slice(3 + 3 * i, 4 + 3 * i), seen=3 + 3 * i) for i in range(2))
        self.end = wrap(seen=7)
        weights = torch.randn(2, 2, 3, 3, generator=generator, dtype=torch.float64)
        self.weights = torch.nn.Parameter(weights)
        self.embedding = torch.nn.Parameter(weights[0, 0])

    def wrappers(self):
        return [self.start, *self.q, *self.z, *self.mlp, self.end]

    def gradients(self):
        """In the weights and in every mask."""
        return [self.embedding.grad, self.weights.grad, *(mask.grad for mask in self.masks().values())]

    def masks(self):
        return {i: w.patch_mask for i, w in enumerate(self.wrappers()) if w.is_dest}

    def forward(self, x, first=0):
        x = self.start(x @ self.embedding) if first == 0 else x
        for i in range(first, 2):
            heads = self.q[i](x[:, :, None].expand(-1, -1, 2, -1))
            x = x + self.z[i](torch.einsum("bthd,hde->bthe", heads, self.weights[i]).tanh()).sum(2)
            x = x + self.mlp[i](x).sin()
        return self.end(x)

    @contextlib.contextmanager
    def patching(self, ablations, current=None):
        current = torch.zeros_like(ablations) if current is None else current
        for w in self.wrappers():
            w.patch_mode, w.curr_src_outs, w.patch_src_outs = True, current, ablations
        yield current
        for w in self.wrappers():
            w.patch_mode, w.curr_src_outs, w.patch_src_outs = False, None, None


def inputs(where="cpu"):
    generator = torch.Generator().manual_seed(1)
    x, ablations = (torch.randn(*n, 4, 5, 3, generator=generator, dtype=torch.float64) for n in ((), (7,)))
    return x.to(where), ablations.to(where)


def gradients(model, passes=1):
    """Output, gradients in every mask and in the weights, after `passes` forwards and one backward."""
    torch.manual_seed(0)
    model.zero_grad()
    x, ablations = inputs(model.weights.device)
    with model.patching(ablations) as current:
        outputs = [model(x + i) for i in range(passes)]
        sum((i + 1) * y.square().sum() for i, y in enumerate(outputs)).backward()
        current = current.detach().clone()
    return [*outputs, current, *model.gradients()]


def mask_of_each_example(model):
    for i, mask in model.masks().items():
        w = model.wrappers()[i]
        w.patch_mask, w.batch_size = torch.nn.Parameter(mask.data.repeat(4, *[1] * mask.dim())), 4


KINDS = {
    "plain": lambda model: None,
    "zero": lambda model: [mask.data.zero_() for mask in model.masks().values()],
    "sparse": lambda model: [mask.data.relu_().mul_(mask.data > 0.6) for mask in model.masks().values()],
    "per example": mask_of_each_example,
    "sigmoid": lambda model: [setattr(w, "mask_fn", "sigmoid") for w in model.wrappers()],
    "hard concrete": lambda model: [setattr(w, "mask_fn", "hard_concrete") for w in model.wrappers()],
    "dropout": lambda model: [setattr(w.dropout_layer, "p", 0.3) for w in model.wrappers() if w.is_dest],
}


@pytest.mark.parametrize("where", DEVICES)
@pytest.mark.parametrize("positions", [None, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_auto_circuit_mask_gradients(wrapper, kind, positions, where):
    model = Model(wrapper, positions).to(where)
    KINDS[kind](model)
    published = gradients(model)
    with auto_circuit.patch():
        torch.testing.assert_close(gradients(model), published)


def test_auto_circuit_backward_of_two_passes_at_once(wrapper):
    model = Model(wrapper)
    published = gradients(model, passes=2)
    with auto_circuit.patch():
        torch.testing.assert_close(gradients(model, passes=2), published)


@pytest.mark.parametrize("without", ["before", "between", "both"])
def test_auto_circuit_passes_without_gradients_change_nothing(wrapper, without):
    model = Model(wrapper)
    x, ablations = inputs()
    published = gradients(model)[2:]
    model.zero_grad()
    with auto_circuit.patch(), model.patching(ablations):
        if without != "between":
            with torch.inference_mode():
                model(x + 1)
        y = model(x)
        if without != "before":
            with torch.inference_mode():
                model(x + 1)
        y.square().sum().backward()
    torch.testing.assert_close(model.gradients(), published)


def test_auto_circuit_sends_no_gradient_to_an_earlier_pass(wrapper):
    model = Model(wrapper)
    model.embedding.requires_grad_(False)
    x, ablations = inputs()

    def run():
        model.zero_grad()
        earlier = x.clone().requires_grad_()
        with model.patching(ablations):
            model(earlier)
            model(x + 1).square().sum().backward()
        assert earlier.grad is None or not earlier.grad.any()
        return model.gradients()[1:]

    published = run()
    with auto_circuit.patch():
        torch.testing.assert_close(run(), published)


def test_auto_circuit_second_order_gradients_are_refused(wrapper):
    """Of a linear loss, too, whose own gradient has none: what depends on the saved masks would be left out."""
    model = Model(wrapper)
    x, ablations = inputs()
    with auto_circuit.patch(), model.patching(ablations):
        loss = model(x).sum()
        with pytest.raises(RuntimeError, match=r"^auto_circuit.patch: expected a first-order backward, got create_gr"):
            torch.autograd.grad(loss, list(model.masks().values()), create_graph=True)


def test_auto_circuit_modules_may_write_to_their_input(wrapper):
    model = Model(wrapper)
    x, ablations = inputs()
    before, model.start.module = x.clone(), torch.nn.ReLU(inplace=True)
    with auto_circuit.patch(), model.patching(ablations):
        model.start(x)
    assert torch.equal(x, before)


def test_auto_circuit_other_ablations_with_the_same_buffer(wrapper):
    model = Model(wrapper)
    x, ablations = inputs()

    def run():
        current, outputs = torch.zeros_like(ablations), []
        for each in (ablations, ablations.sin()):
            with model.patching(each, current):
                outputs.append(model(x))
        return outputs

    published = run()
    with auto_circuit.patch():
        torch.testing.assert_close(run(), published)


@pytest.mark.parametrize("positions", [None, 5])
@pytest.mark.parametrize("kind", ["plain", "zero", "hard concrete"])
def test_auto_circuit_ablations_that_are_learned(wrapper, kind, positions):
    model = Model(wrapper, positions)
    KINDS[kind](model)
    x, ablations = inputs()

    def run():
        torch.manual_seed(0)
        learned, found = ablations.clone().requires_grad_(), []
        for _ in range(2):
            model.zero_grad()
            with model.patching(learned):
                found.append(model(x))
                (gradient,) = torch.autograd.grad(found[-1].square().sum(), learned)
            found.append(gradient)
            with torch.no_grad():
                learned -= 0.1 * gradient
        return found

    published = run()
    with auto_circuit.patch():
        torch.testing.assert_close(run(), published)


def test_auto_circuit_ablations_that_change_in_place(wrapper):
    """Also those of senders before the layer from which the next pass runs."""
    model = Model(wrapper)
    x, ablations = inputs()

    @torch.no_grad()
    def run():
        changed = ablations.clone()
        with model.patching(changed):
            outputs = [model(x)]
            changed.mul_(2)
            return [*outputs, model(x, first=1)]

    published = run()
    with auto_circuit.patch():
        torch.testing.assert_close(run(), published)


def test_auto_circuit_runs_from_a_later_layer_in_inference_mode(wrapper):
    """The senders before it keep the outputs they were given; ablations may come from inference mode."""
    model = Model(wrapper)
    x, ablations = inputs()
    with torch.inference_mode():
        ablations, current = ablations.clone(), ablations.sin()

    def run():
        with model.patching(ablations, current.clone()), torch.inference_mode():
            return model(x, first=1)

    published = run()
    with auto_circuit.patch():
        torch.testing.assert_close(run(), published)


def test_auto_circuit_without_patch_mode_and_after_restore(wrapper):
    model, (x, _), original = Model(wrapper), inputs(), wrapper.forward
    published = model(x)
    with auto_circuit.patch():
        assert wrapper.forward is not original
        assert torch.equal(model(x), published)
        with auto_circuit.patch():
            pass
        assert wrapper.forward is not original
    assert wrapper.forward is original


def test_auto_circuit_reads_without_a_second_buffer_for_each(wrapper):
    """What a backward needs of the senders is one buffer, whatever the number of receivers."""
    model = Model(wrapper)
    x, ablations = inputs()

    def saved():
        storages = {}

        def pack(tensor):
            storages[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with model.patching(ablations), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            model(x)
        return sum(t.untyped_storage().nbytes() for t in storages.values())

    published = saved()
    with auto_circuit.patch():
        assert saved() < published - ablations.nbytes


def test_auto_circuit_of_another_version_is_refused(monkeypatch):
    install(monkeypatch, auto_circuit__utils__patch_wrapper=WRAPPER.replace("dropout_layer", "dropout"))
    message = "auto_circuit.patch: expected auto_circuit.utils.patch_wrapper.PatchWrapperImpl.forward to use 'dropout_l"
    with pytest.raises(RuntimeError, match=message):
        auto_circuit.patch()
