"""Checkpoints without what a circuit does not use: against plain hooks on the model; what goes, and what is refused."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

import eap_circuits as eap
from eap_circuits.adapters import bind
from eap_circuits.errors import InputWarning
from eap_circuits.selfcheck import StayDouble
from tests.circuits.conftest import logit_difference, prompts, random_circuit
from tests.circuits.decoders import Decoder
from tests.circuits.generated.generated_tasks import TOKENIZERS
from tests.circuits.models import VOCABULARY
from tests.circuits.untouched import differences, snapshot

# Of three layers the middle one is not used, and the last one's MLP is not.
NODES = ["a0.h0", "a0.h2", "m0", "a2.h4"]
LLAMA = ("model.layers", "self_attn.o_proj", "mlp")
# name: (paths of layers, output projection and MLP; nodes; how many layers, heads and key/value heads are left)
CASES = {
    "llama": (LLAMA, NODES, (2, 2, 1)),
    "llama-mqa-bias": (LLAMA, NODES, (3, 2, 1)),  # the middle layer's bias has no place to go
    "qwen2": (LLAMA, NODES, (2, 2, 2)),
    "qwen3": (LLAMA, NODES, (2, 2, 1)),
    "qwen3-moe": (LLAMA, NODES, (2, 2, 1)),
    "phi3": (LLAMA, NODES, (2, 2, 1)),
    "gemma2": (LLAMA, NODES, (2, 2, 1)),
    "gemma3": (LLAMA, NODES, (2, 2, 1)),
    "olmo2": (LLAMA, NODES, (2, 6, 2)),  # one norm of all heads' queries
    "gpt-neox": (("gpt_neox.layers", "attention.dense", "mlp"), NODES, (2, 6, 6)),
    "gpt2": (("transformer.h", "attn.c_proj", "mlp"), NODES[:3], (1, 3, 3)),
    "opt": (("model.decoder.layers", "self_attn.out_proj", "fc2"), NODES[:3], (1, 3, 3)),
    "mamba": (("backbone.layers", "", "mixer"), ["m0", "m2"], (2, 0, 0)),
}


def of_nodes(graph, names):
    kept = torch.tensor([float(name in names) for name in graph.senders])
    return eap.NodeScores(graph, kept).select(len(names))


def silence(model, paths, names):
    """Let all heads and MLPs but these write zero."""
    (layers, out, mlp), handles = paths, []
    for index, layer in enumerate(model.get_submodule(layers)):
        if out:
            heads = model.config.num_attention_heads
            gone = [head for head in range(heads) if f"a{index}.h{head}" not in names]

            def without(_, args, heads=heads, gone=gone):
                z = args[0].unflatten(-1, (heads, -1)).clone()
                z[..., gone, :] = 0
                return z.flatten(-2)

            handles.append(layer.get_submodule(out).register_forward_pre_hook(without))
        if f"m{index}" not in names:
            handles.append(layer.get_submodule(mlp).register_forward_hook(lambda _, __, y: torch.zeros_like(y)))
    return handles


def loaded(folder, model):
    """What `from_pretrained` makes of a folder, with this model's implementations."""
    given = {
        name: value
        for name in ("attn_implementation", "experts_implementation")
        if (value := getattr(model.config, f"_{name}", None)) is not None
    }
    found = AutoModelForCausalLM.from_pretrained(folder, **given)
    assert found.dtype == model.dtype
    return found.double()  # its buffers, too


@torch.no_grad()
def logits(model, tokens):
    return model(tokens).logits


@pytest.mark.parametrize("name", CASES)
def test_it_computes_what_the_model_does_if_the_other_nodes_write_zero(name, make_model, tmp_path):
    paths, nodes, (layers, heads, kv_heads) = CASES[name]
    model = make_model(name)
    model.save_pretrained(tmp_path / "model")
    model = loaded(tmp_path / "model", model)  # which makes its buffers in float64 from the start
    state = snapshot(model)
    small = eap.export_model(model, of_nodes(bind(model).graph("kv"), nodes), tmp_path / "small")
    assert not differences(state, snapshot(model))
    found, tokens = loaded(tmp_path / "small", model), torch.arange(20).view(2, 10) % VOCABULARY
    handles = silence(model, paths, nodes)
    with StayDouble():
        right = logits(model, tokens)
        torch.testing.assert_close(logits(found, tokens), right)
        torch.testing.assert_close(logits(small.double(), tokens), right)
        said = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
        assert found.generate(tokens, **said).equal(model.generate(tokens, **said))
    for handle in handles:
        handle.remove()
    graph, before = bind(found).graph("kv"), sum(x.numel() for x in model.parameters())
    assert (graph.n_layers, *{*zip(graph.n_heads, graph.n_kv_heads)}) == (layers, (heads, kv_heads))
    assert sum(x.numel() for x in found.parameters()) < before
    sizes = [(tmp_path / folder / "model.safetensors").stat().st_size for folder in ("small", "model")]
    assert sizes[0] < sizes[1]
    assert {path.name for path in tmp_path.iterdir()} == {"model", "small"}


@pytest.mark.filterwarnings("ignore:export_model. the checkpoint is as large as the model")
@pytest.mark.parametrize("heads", ["kv", "query"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_it_is_the_node_circuit_under_zero_ablation(name, heads, make_model, make_pairs, tmp_path):
    """Of circuits with more and with fewer nodes than fit into whole groups."""
    model, data = make_model(name), make_pairs(seed=3, n=4)
    graph = bind(model).graph(heads)
    for seed, share in enumerate((0.02, 0.05, 0.1, 0.3)):
        circuit = random_circuit(graph, seed, share)
        with StayDouble():
            small = eap.export_model(model, circuit, tmp_path / str(seed)).double()
            right = eap.evaluate(model, circuit.node_circuit(), data, ablation="zero").values
            for e, value in enumerate(right):
                found = logit_difference(logits(small, prompts(data, e)[0][None])[0, -1], data, e)
                torch.testing.assert_close(found, value)


def test_edges_on_no_path_use_nothing(make_model, tmp_path):
    model = make_model("llama")
    circuit = of_nodes(bind(model).graph("kv"), NODES)
    mask = circuit.mask.clone()
    mask[0, circuit.graph.receivers.index("m1")] = True  # nothing reads m1
    small = eap.export_model(model, eap.Circuit(circuit.graph, mask), tmp_path / "small")
    assert small.config.num_hidden_layers == 2


def test_mlps_that_no_layer_uses_have_one_feature(make_model, tmp_path):
    for name, width in (("llama", "intermediate_size"), ("gpt2", "n_inner")):
        model, tokens = make_model(name), torch.arange(10)[None]
        handles = silence(model, CASES[name][0], ["a0.h0", "a1.h1"])
        with StayDouble():
            right = logits(model, tokens)
            for handle in handles:
                handle.remove()
            eap.export_model(model, of_nodes(bind(model).graph("kv"), ["a0.h0", "a1.h1"]), tmp_path / name)
            found = loaded(tmp_path / name, model)
            torch.testing.assert_close(logits(found, tokens), right)
        assert getattr(found.config, width) == 1 and found.config.num_hidden_layers == 2


def test_experts_that_no_layer_uses_still_run_all_at_once(make_model, make_pairs, tmp_path):
    model, data = make_model("mixtral", torch.float32), make_pairs(n=2)
    model.set_experts_implementation("grouped_mm")
    circuit = of_nodes(bind(model).graph("kv"), ["a0.h0"])
    small = eap.export_model(model, circuit, tmp_path / "small")
    assert small.config.intermediate_size == 4  # 16 bytes
    right = eap.evaluate(model, circuit, data, ablation="zero").values
    for e, value in enumerate(right):
        found = logit_difference(logits(small, prompts(data, e)[0][None])[0, -1], data, e)
        torch.testing.assert_close(found.double(), value, rtol=1e-4, atol=1e-4)


def test_nothing_is_left_of_a_circuit_without_nodes(make_model, tmp_path):
    """But one layer, as a model has one or more."""
    model, tokens = make_model("gemma2"), torch.arange(10)[None]
    empty = of_nodes(bind(model).graph("kv"), [])
    with StayDouble():
        small = eap.export_model(model, empty, tmp_path / "small").double()
        decoder = Decoder(model)
        torch.testing.assert_close(logits(small, tokens)[0], decoder.unembed(decoder.embed(tokens[0])).detach())
    assert small.config.layer_types == ["sliding_attention"] and small.config.num_attention_heads == 1


@pytest.mark.parametrize(("name", "norm"), [("jamba", "final_layernorm"), ("lfm2", "embedding_norm")])
def test_one_layer_of_each_kind_stays(name, norm, make_model, tmp_path):
    """The classes of hybrids look for each in their cache, even where nothing of it is used."""
    model, tokens = make_model(name), torch.arange(10)[None]
    empty = of_nodes(bind(model).graph("kv"), [])
    with StayDouble(), torch.no_grad():
        small = eap.export_model(model, empty, tmp_path / "small").double()
        read = model.get_input_embeddings()(tokens)
        torch.testing.assert_close(logits(small, tokens), model.lm_head(getattr(model.model, norm)(read)))
        assert small.generate(tokens, max_new_tokens=2, do_sample=False).shape == (1, 12)


def test_the_tokenizer_comes_along_and_an_empty_folder_is_taken(make_model, tmp_path):
    tokenizer = TOKENIZERS["single digits"]()
    model, folder = make_model("llama", torch.bfloat16), tmp_path / "small"
    folder.mkdir()
    small = eap.export_model(model, of_nodes(bind(model).graph("kv"), NODES), folder, tokenizer)
    assert AutoTokenizer.from_pretrained(folder)("Ann 12").input_ids == tokenizer("Ann 12").input_ids
    assert small.dtype == AutoModelForCausalLM.from_pretrained(folder).dtype == torch.bfloat16


def test_what_is_used_throughout_is_no_smaller(make_model, tmp_path):
    model = make_model("gpt2", torch.float32)
    graph = bind(model).graph("kv")
    with pytest.warns(InputWarning, match="as large as the model"):
        eap.export_model(model, of_nodes(graph, ["a0.h1", "m0", "m1"]), tmp_path / "small")


class Own(GPT2LMHeadModel):
    """A class that from_pretrained would need code for."""


def of_depth(**fields):
    """A model whose middle layer is not used, and the circuit."""
    torch.manual_seed(0)
    config = GPT2Config(n_layer=3, n_embd=24, n_head=3, vocab_size=VOCABULARY, n_positions=32, **fields)
    model = Own(config) if fields.get("own") else GPT2LMHeadModel(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    return model, of_nodes(bind(model).graph("kv"), ["a0.h0", "m0", "a2.h1", "m2"])


def test_what_cannot_be_left_out_is_refused_and_nothing_written(make_model, tmp_path):
    changed, circuit = of_depth()
    changed.transformer.h[0].mlp.extra = torch.nn.Linear(2, 2)  # of which its configuration says nothing
    bert, gemma = make_model("bert"), make_model("gemma4")
    other = of_nodes(bind(make_model("llama")).graph("kv"), NODES)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    for model, used, folder, tokenizer, said in (
        (*of_depth(), "full", None, "full: expected a new or an empty folder, found one with files"),
        (*of_depth(), "none/small", None, "expected a folder that exists"),
        (*of_depth(), "small", "gpt2", "tokenizer: expected a Hugging Face tokenizer, found str"),
        (of_depth()[0], other, "small", None, "circuit: expected one of"),
        (bert, of_nodes(bind(bert).graph("kv"), ["m0"]), "small", None, "whose blocks add to the residual stream"),
        (gemma, of_nodes(bind(gemma).graph("kv"), ["m0", "p1"]), "small", None, "with keys of their own"),
        (*of_depth(own=True), "small", None, "expected a class of transformers, which from_pretrained loads"),
        (changed, circuit, "small", None, "expected the weights that its configuration says"),
        # Attention is scaled by the layer's number, which is another one without the layer before.
        (*of_depth(scale_attn_by_inverse_layer_idx=True), "small", None, "found logits that then differ by"),
    ):
        with pytest.raises(eap.InputError, match=said.replace("(", r"\(")):
            eap.export_model(model, used, tmp_path / folder, tokenizer)
        assert [path.name for path in tmp_path.rglob("*")] == ["full", "notes.txt"]


def test_an_error_while_writing_leaves_nothing(make_model, tmp_path, monkeypatch):
    model = make_model("llama")

    def full(self, folder, **_):
        (folder / "config.json").write_text("{}")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(model), "save_pretrained", full)
    with pytest.raises(eap.InputError, match=r"small: cannot be written \(No space left on device\)"):
        eap.export_model(model, of_nodes(bind(model).graph("kv"), NODES), tmp_path / "small")
    assert not list(tmp_path.iterdir())
