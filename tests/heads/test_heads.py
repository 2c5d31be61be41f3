"""The head of every causal LM in transformers, read by tables and held against its own logits."""

import copy
import inspect
import sys
import threading

import pytest
import torch
from torch import Tensor, nn

import treg

transformers = pytest.importorskip("transformers")

from causal_lms import MULTIMODAL, NOT_BUILT, REFUSED, V, build, loud, tiny_config  # noqa: E402
from tiny import seeded  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL_LMS  # noqa: E402

from treg.heads import check_sequences, install_head, resolve_head, run_head  # noqa: E402
from treg.heads import checks as head_checks  # noqa: E402
from treg.heads import tables as heads  # noqa: E402

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing`:FutureWarning",
    "ignore:Model has `tie_word_embeddings:UserWarning",
)


def scored(hidden, operands, target):
    return treg.linear_logprobs(hidden, target=target, **operands).logprobs


def dense(model, target, **inputs):
    logits = model(**inputs, return_dict=True, **head_checks.without_cache(model)).logits.float()
    return logits.log_softmax(-1).gather(-1, target.unsqueeze(-1)).squeeze(-1)


def tokens(batch=2, length=8, high=80):
    return torch.randint(2, high, (batch, length))


def head_is_right(model):
    spec = resolve_head(model)
    ids, target = tokens(), tokens()
    with torch.no_grad():
        found = spec.through(
            lambda h, operands: scored(h, operands, target), spec.hidden(input_ids=ids)
        )
        expected = dense(model, target, input_ids=ids)
    assert torch.isfinite(expected).all()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("model_type", CAUSAL_LMS)
def test_every_causal_lm(model_type):
    """Right, refused by name, or in the table of those that cannot be built small. A type new to
    transformers that
    cannot be built fails here: it needs a row."""
    if model_type in NOT_BUILT:
        pytest.skip(NOT_BUILT[model_type])
    model = build(model_type)
    if model_type in REFUSED:
        with pytest.raises(ValueError, match=CAUSAL_LMS[model_type]):
            resolve_head(model)
    else:
        head_is_right(model)


def test_few_are_not_right():
    right = [t for t in CAUSAL_LMS if t not in REFUSED and t not in NOT_BUILT]
    assert (
        len(right) >= len(CAUSAL_LMS) - 6
    )  # transformers 5.23: 183 of 189, 3 refused, 3 not built


@pytest.mark.parametrize("model_type", MULTIMODAL)
def test_multimodal(model_type):
    """The scale and cap of the text config."""
    head_is_right(build(model_type, MULTIMODAL[model_type]))


@pytest.mark.parametrize(
    ("table", "row", "model_type"),
    [
        ("SCALES", "logit_scale", "cohere"),
        ("SCALES", "lm_head_multiplier", "falcon_h1"),
        ("SCALES", "output_multiplier", "muse_glimmer"),
        ("SCALES", "logits_scaling", "granite"),
        ("SCALES", "logits_scaling", "minicpm3"),
        ("SCALES", "logits_mup_width_multiplier", "inkling_text"),
        ("SOFTCAPS", "final_logit_softcapping", "gemma2"),
        ("SOFTCAPS", "logits_soft_cap", "recurrent_gemma"),
        ("SOFTCAPS", "output_logit_soft_cap", "xlstm"),
        ("VOCABS", "unpadded_vocab_size", "inkling2_text"),
        ("EXCEPTIONS", "gemma3", "gemma3"),
        ("EXCEPTIONS", "hyperclovax", "hyperclovax"),
        ("EXCEPTIONS", "mpt", "mpt"),
        ("BEFORE", 0, "bert"),
        ("BEFORE", 1, "rembert"),
        ("BEFORE", 2, "roberta"),
        ("BEFORE", 3, "electra"),
        ("BEFORE", 4, "modernbert-decoder"),
    ],
)
def test_without_a_row_the_check_refuses(monkeypatch, table, row, model_type):
    """Each row of each table is needed, and the check sees a head that is misread."""
    rows = getattr(heads, table)
    if isinstance(rows, dict):
        fewer = {k: v for k, v in rows.items() if k != row}
    else:
        fewer = tuple(r for i, r in enumerate(rows) if row not in (i, r))
    assert len(fewer) == len(rows) - 1
    model = build(model_type, MULTIMODAL.get(model_type))
    head_is_right(model)
    monkeypatch.setattr(heads, table, fewer)
    with pytest.raises(ValueError, match=rf"{type(model).__name__} .*head was misread"):
        resolve_head(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("model_type", ["llama", "gemma2", "granite", "mamba", "bert", "qwen3_moe"])
def test_16_bit(model_type, dtype):
    """The check's tolerance holds, and the rows come in the weight's dtype (mamba's residual stream
    is float32).
    """
    spec = resolve_head(build(model_type).to(dtype))
    hidden, weight = spec.through(
        lambda h, operands: (h, operands["weight"]), spec.hidden(input_ids=tokens())
    )
    assert hidden.dtype == weight.dtype == dtype


def llama(cls=LlamaForCausalLM, **given):
    return loud(cls(tiny_config(LlamaConfig, **given)))


class Doubled(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = 2 * out.logits
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_lie_is_caught(dtype):
    with pytest.raises(
        ValueError,
        match=r"Doubled \(model_type 'llama'\): its head was misread: log-probs differ by",
    ):
        resolve_head(llama(Doubled).to(dtype))


def test_check_leaves_no_trace():
    model = llama(attention_dropout=0.5).train()
    model.model.layers[0].eval()
    flags = [module.training for module in model.modules()]
    random = torch.get_rng_state()
    forward = model.forward
    with torch.autocast("cpu", dtype=torch.bfloat16):
        resolve_head(model)
        assert torch.is_autocast_enabled("cpu")
    assert [module.training for module in model.modules()] == flags
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.is_grad_enabled()
    assert model.forward == forward
    assert all(p.grad is None for p in model.parameters())


def test_a_failing_model_is_named_and_restored():
    class Failing(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            raise RuntimeError("out of luck")

    model = llama(Failing).train()
    with pytest.raises(
        ValueError, match=r"Failing .*could not be checked: RuntimeError\('out of luck'\)"
    ):
        install_head(model)
    assert all(module.training for module in model.modules())
    assert "forward" not in vars(model)


def gpu_only(module, args):
    raise RuntimeError("no kernel for the CPU")


def shape_bug(module, args, output):
    return output @ torch.ones(3, 3)


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize(
    "broken, original",
    [
        (lambda mlp: mlp.register_forward_pre_hook(gpu_only), "no kernel for the CPU"),
        (lambda mlp: mlp.register_forward_hook(shape_bug), "shapes cannot be multiplied"),
    ],
    ids=["a layer for GPUs", "a wrong shape"],
)
def test_an_error_of_the_models_own_forward_is_not_blamed_on_the_head(broken, original, later):
    """Also where the check waits for the weights, and runs in the first forward."""
    model = llama()
    spec = None
    if later:
        with torch.device("meta"):
            waiting = LlamaForCausalLM(model.config)
        spec = install_head(waiting)
        waiting.load_state_dict(model.state_dict(), assign=True)
        waiting.model.rotary_emb = model.model.rotary_emb
        model = waiting
    broken(model.model.layers[0].mlp)
    with pytest.raises(
        ValueError,
        match=r"LlamaForCausalLM .*the model's own forward failed on 8 tokens on cpu",
    ) as caught:
        if later:
            model(tokens(), head_fn=lambda h, operands: h)
        else:
            install_head(model)
    message = str(caught.value)
    assert original in message and "open an issue" not in message
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert original in str(caught.value.__cause__)
    if later:
        assert len(spec.pending) == 1


def test_an_error_in_reading_the_head_is_the_heads():
    """The model's own forward is fine: what fails is the backbone, called as treg calls it."""

    class Private(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            self.inside = True
            try:
                return super().forward(*args, **kwargs)
            finally:
                self.inside = False

    def private(module, args):
        if not model.inside:
            raise RuntimeError("called from outside")

    model = llama(Private)
    model.model.register_forward_pre_hook(private)
    with pytest.raises(
        ValueError,
        match=r"Private .*: its head could not be checked: RuntimeError\('called from outside'\)"
        r"; compute this model's loss from dense logits, and please open an issue",
    ) as caught:
        install_head(model)
    assert str(caught.value.__cause__) == "called from outside"
    assert "own forward" not in str(caught.value)


@pytest.mark.parametrize("packing", [False, True])
def test_an_error_of_the_model_in_the_check_of_sequences(packing):
    def at_most_8_tokens(module, args):
        if args[0].shape[1] > 8:
            raise RuntimeError("too long")

    model = llama()
    spec = resolve_head(model)
    model.model.layers[0].mlp.register_forward_pre_hook(at_most_8_tokens)
    with pytest.raises(
        ValueError, match=r"LlamaForCausalLM .*the model's own forward failed on 16 tokens on cpu"
    ) as caught:
        check_sequences(spec, packing=packing)
    assert str(caught.value.__cause__) == "too long"
    assert ("packing=False" in str(caught.value)) == packing


@pytest.mark.parametrize("lies", [False, True])
def test_weights_that_cannot_be_read_yet(lies):
    """The check waits for the first forward with values, and runs until it has passed."""
    with torch.device("meta"):
        model = (Doubled if lies else LlamaForCausalLM)(tiny_config(LlamaConfig))
    spec = install_head(model)
    check_sequences(spec)
    assert len(spec.pending) == 2
    whole = llama()
    model.load_state_dict(whole.state_dict(), assign=True)
    model.model.rotary_emb = whole.model.rotary_emb  # a buffer, not in the state
    ids, target = tokens(), tokens()

    def call():
        return model(input_ids=ids, head_fn=lambda h, operands: scored(h, operands, target))

    if lies:
        for _ in range(2):
            with pytest.raises(ValueError, match=r"Doubled .*misread: log-probs differ"):
                call()
        return
    torch.testing.assert_close(call(), dense(whole, target, input_ids=ids), rtol=0, atol=1e-5)
    assert not spec.pending


def test_no_language_model():
    for wrong in (nn.Linear(2, 2), nn.DataParallel(llama())):
        with pytest.raises(TypeError, match="expected an unwrapped PreTrainedModel"):
            resolve_head(wrong)


def test_sharded_weights():
    """What nothing gathers is refused: a gradient of it would be left unreduced."""
    from torch.distributed.tensor import distribute_tensor, init_device_mesh

    model = llama()
    install_head(model)
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    try:
        mesh = init_device_mesh("cpu", (1,))
        model.lm_head.weight = nn.Parameter(distribute_tensor(model.lm_head.weight.detach(), mesh))
        with pytest.raises(ValueError, match=r"LlamaForCausalLM .*sharded in the model's forward"):
            model(tokens(), head_fn=lambda h, operands: h)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("tied", [False, True])
def test_head_fn(tied):
    """Values and gradients of the dense path, through the model's own forward and its hooks."""
    model = llama(tie_word_embeddings=tied)
    ids, target = tokens(), tokens()
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    before = model(input_ids=ids).logits
    spec = install_head(model)
    calls = []
    model.register_forward_pre_hook(lambda *_: calls.append("root"))
    model.model.register_forward_pre_hook(lambda *_: calls.append("backbone"))

    found = model(ids, attention_mask=mask, head_fn=lambda h, operands: scored(h, operands, target))
    assert calls == ["root", "backbone"]
    expected = dense(model, target, input_ids=ids, attention_mask=mask)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    parameters = list(model.parameters())
    for a, b in zip(
        torch.autograd.grad(found.sum(), parameters),
        torch.autograd.grad(expected.sum(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)

    assert torch.equal(model(input_ids=ids).logits, before)
    assert install_head(model) is spec
    assert torch.equal(model(input_ids=ids).logits, before)
    with pytest.raises(ValueError, match="logits_to_keep"):
        model(ids, logits_to_keep=1, head_fn=lambda h, operands: h)


def test_generation_and_copies():
    """The patched forward keeps its signature, which generate() and Trainer read; a copy's is its
    own.
    """
    model, ids = llama(), tokens()
    greedy = dict(max_new_tokens=3, do_sample=False, pad_token_id=0)
    signature, generated = inspect.signature(model.forward), model.generate(ids, **greedy)
    install_head(model)
    assert inspect.signature(model.forward) == signature
    copied = copy.deepcopy(model)
    assert copied._treg_head.model is copied
    rows = copied(ids, head_fn=lambda h, operands: h)
    with torch.no_grad():
        model.model.norm.weight.zero_()
    assert torch.equal(copied(ids, head_fn=lambda h, operands: h), rows)
    assert torch.equal(copied.generate(ids, **greedy), generated)


def test_replaced_embeddings():
    model = llama()
    spec = install_head(model)
    model.resize_token_embeddings(V + 4)
    with pytest.raises(ValueError, match="replaced"):
        model(tokens(), head_fn=lambda h, operands: h)
    again = install_head(model)
    assert again is not spec
    assert model(tokens(), head_fn=lambda h, operands: operands["weight"]).shape[0] == V + 4


LORA = dict(
    r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
)


HEAD = {"target_modules": ["q_proj", "lm_head"]}
PEFT = {
    "layers": {},
    "saved head": {"modules_to_save": ["lm_head"]},
    "tokens": {"trainable_token_indices": [3, 5, 40]},
    "head": HEAD,
    "head, scaled": HEAD | {"lora_alpha": 3, "use_rslora": True},
    "weight": {"target_parameters": ["lm_head.weight"]},
    "embeddings, tied": {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
}


@pytest.mark.parametrize(
    "more, tied",
    [(x, tied) for x in PEFT for tied in (False, True) if tied or x != "embeddings, tied"],
)
def test_peft(tied, more):
    """Adapters on and off, each against the dense path; gradients reach what PEFT trains."""
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        llama(tie_word_embeddings=tied), peft.LoraConfig(**LORA | PEFT[more])
    )
    for name, p in model.named_parameters():
        if p.requires_grad and ("lora" not in name or "lora_embedding" in name or "lora_B" in name):
            nn.init.normal_(p, 0, 0.3)
    same_as_dense(model)


def same_as_dense(model):
    """Log-probs and gradients of a PEFT model with adapters, and log-probs without."""
    install_head(model)
    ids, target = tokens(), tokens()

    def both():
        found = model(input_ids=ids, head_fn=lambda h, operands: scored(h, operands, target))
        expected = dense(model, target, input_ids=ids)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        return found, expected

    found, expected = both()
    trained = [p for p in model.parameters() if p.requires_grad]
    for a, b in zip(
        torch.autograd.grad(found.sum(), trained),
        torch.autograd.grad(expected.sum(), trained),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    with model.disable_adapter(), torch.no_grad():
        off, _ = both()
    assert (found - off).abs().max() > 1e-2


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
def test_several_adapters_on_the_head():
    """Two at once, one of them with a bias; a third that is not active; then merged."""
    peft = pytest.importorskip("peft")
    config = LORA | HEAD
    model = peft.get_peft_model(llama(), peft.LoraConfig(**config))
    model.add_adapter("second", peft.LoraConfig(**config | {"r": 2, "lora_bias": True}))
    model.add_adapter("third", peft.LoraConfig(**config))
    model.base_model.set_adapter(["default", "second"])
    nn.init.normal_(model.get_output_embeddings().lora_B["second"].bias, 0, 0.3)
    same_as_dense(model)
    ids, target = tokens(), tokens()
    model.base_model.set_adapter("default")
    before = model(input_ids=ids, head_fn=lambda h, operands: scored(h, operands, target))
    model.merge_adapter()
    found = model(input_ids=ids, head_fn=lambda h, operands: scored(h, operands, target))
    torch.testing.assert_close(found, dense(model, target, input_ids=ids), rtol=0, atol=1e-5)
    torch.testing.assert_close(found, before, rtol=0, atol=1e-4)


def test_adapter_dropout_on_the_head():
    """The adapter's input is dropped out, the head's own is not; and the random numbers are
    PEFT's.
    """
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(**LORA | {"target_modules": ["lm_head"], "lora_dropout": 0.5})
    model = peft.get_peft_model(llama(), config)
    install_head(model)
    model.train()
    ids, target = tokens(), tokens()
    found = seeded(
        lambda: model(input_ids=ids, head_fn=lambda h, operands: scored(h, operands, target))
    )
    torch.testing.assert_close(
        found, seeded(lambda: dense(model, target, input_ids=ids)), rtol=0, atol=1e-5
    )
    assert (found - seeded(lambda: dense(model.eval(), target, input_ids=ids))).abs().max() > 1e-2


def test_a_young_adapter_in_bfloat16_is_not_lost():
    """An update below the rounding of W counts in full: merging it into W would lose it."""
    peft = pytest.importorskip("peft")
    model = llama().bfloat16()
    target, hidden = tokens(), seeded(lambda: torch.randn(2, 8, 32).bfloat16())
    adapted = peft.get_peft_model(model, peft.LoraConfig(**LORA | {"target_modules": ["lm_head"]}))
    layer = adapted.get_output_embeddings()
    with torch.no_grad():
        layer.lora_B["default"].weight.mul_(2e-3)
    spec = resolve_head(adapted)
    delta = layer.get_delta_weight("default").double()
    base = layer.base_layer.weight.double()

    def exact(weight):
        return (hidden.double() @ weight.T).log_softmax(-1).gather(-1, target[..., None])[..., 0]

    change = exact(base + delta) - exact(base)
    merged = exact((base + delta).bfloat16().double()) - exact(base)
    found = spec.through(
        lambda h, o: (
            treg.linear_logprobs(h, target=target, **o, logits_dtype=torch.float32).logprobs
        ),
        hidden,
    ) - exact(base)
    assert (found - change).norm() < 0.02 * change.norm()
    assert (merged - change).norm() > 0.2 * change.norm()


@pytest.mark.parametrize("more", [{"use_dora": True}, {"cls": "LoHaConfig"}])
def test_other_adapters_on_the_head_are_refused(more):
    peft = pytest.importorskip("peft")
    make = getattr(peft, more.pop("cls", "LoraConfig")) if "cls" in more else peft.LoraConfig
    common = {"r": 4, "target_modules": ["lm_head"], "task_type": "CAUSAL_LM"}
    adapted = peft.get_peft_model(llama(), make(**common, **more))
    with pytest.raises(
        ValueError, match=r"LlamaForCausalLM .*adapters: expected .*LoRA.*modules_to_save"
    ) as caught:
        install_head(adapted)
    # a refusal with its own remedy gets no second one
    assert "open an issue" not in str(caught.value)


def test_adapters_added_later():
    """Whatever PEFT replaces below the installed forward is found there, the modules before the
    projection too.
    """
    peft = pytest.importorskip("peft")
    model = build("roberta")
    install_head(model)
    config = peft.LoraConfig(r=4, target_modules=["query", "dense"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    ids, target = tokens(), tokens()
    assert isinstance(model.lm_head.dense, peft.tuners.lora.LoraLayer)
    found = adapted(input_ids=ids, head_fn=lambda h, operands: scored(h, operands, target))
    torch.testing.assert_close(found, dense(adapted, target, input_ids=ids), rtol=0, atol=1e-5)


def test_adapter_added_to_the_head_later():
    """The projection is another then: the head is read again."""
    peft = pytest.importorskip("peft")
    model = llama()
    install_head(model)
    adapted = peft.get_peft_model(model, peft.LoraConfig(**LORA | HEAD))
    with pytest.raises(ValueError, match="replaced"):
        adapted(tokens(), head_fn=lambda h, operands: h)
    same_as_dense(adapted)


def test_sequences_of_a_causal_model():
    spec = resolve_head(build("llama"))
    state = torch.get_rng_state()
    check_sequences(spec)
    check_sequences(spec, packing=True)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("model_type", ["mamba", "bloom", "rwkv"])
def test_packing_where_positions_are_ignored(model_type):
    spec = resolve_head(build(model_type))
    check_sequences(spec)
    with pytest.raises(ValueError, match="packed sequences see one another"):
        check_sequences(spec, packing=True)


def test_a_model_that_looks_ahead():
    with pytest.raises(ValueError, match="later tokens"):
        check_sequences(resolve_head(build("bert")))


def test_flash_attention_is_not_needed_for_the_checks():
    """It takes 16-bit inputs on a GPU only; the checks may run before the model is there."""
    from transformers import AttentionInterface

    def flash(*args, **kwargs):
        raise RuntimeError("no GPU")

    AttentionInterface.register("flash_probe", flash)
    model = llama()
    model.config._attn_implementation = "flash_probe"
    check_sequences(install_head(model), packing=True)
    assert model.config._attn_implementation == "flash_probe"
    with pytest.raises(RuntimeError, match="no GPU"):
        model(tokens())


def test_two_threads_on_one_model():
    """Heads and plain forwards beside each other, and the model is as it was."""
    model = llama()
    install_head(model)
    ids, target = tokens(), tokens()
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        expected = scored_by(model, ids, target)
    failures = []

    def work(plain):
        with torch.no_grad():
            for _ in range(30):
                found = model(input_ids=ids).logits if plain else scored_by(model, ids, target)
                if not (
                    isinstance(found, Tensor) and torch.equal(found, logits if plain else expected)
                ):
                    failures.append(type(found))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work, args=(i % 2 == 0,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not failures and "forward" not in vars(model.lm_head)


def scored_by(model, ids, target):
    return model(input_ids=ids, head_fn=lambda h, operands: scored(h, operands, target))


def test_a_model_without_a_head_installed():
    """transformers' Llama takes any argument and drops it."""
    with pytest.raises(
        ValueError, match=r"model: expected one whose head is installed, got LlamaForCausalLM"
    ):
        run_head(llama(), lambda h, operands: h, input_ids=tokens())
