"""Every causal LM type of transformers, small, with numbers in its head that are not 1."""

import inspect

import torch
import transformers
from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL_LMS

from treg.heads import tables as heads

V, D = 96, 32
SIZES = (
    (
        V,
        "vocab_size vocab_size_per_layer_input decoder_vocab_size pronunciation_vocab_size"
        " shape_vocab_size encoder_hash_byte_group_vocab ngram_vocab_size_base",
    ),
    (
        D,
        "hidden_size d_model n_embd embedding_dim embedding_size input_embedding_size"
        " output_embedding_size emb_dim word_embed_proj_dim attention_hidden_size lru_width"
        " hidden_dim hidden_size_global mamba_d_ssm intermediate_size ffn_dim ffn_hidden_size"
        " n_inner decoder_ffn_dim encoder_ffn_dim dim_ff dff d_inner feed_forward_size"
        " moe_intermediate_size intermediate_size_mlp shared_expert_intermediate_size"
        " shared_experts_intermediate_size shared_intermediate_size dense_intermediate_size"
        " expert_ffn_hidden_size moe_shared_expert_intermediate_size",
    ),
    (
        64,
        "max_position_embeddings n_positions max_seq_len n_ctx context_length model_max_length"
        " max_target_positions",
    ),
    (
        16,
        "qk_head_dim dim_model_base",
    ),
    (
        8,
        "head_dim kv_channels attention_head_dim attention_head_size swa_head_dim"
        " global_head_dim dim_head d_head q_lora_rank kv_lora_rank o_lora_rank qk_rope_head_dim"
        " qk_nope_head_dim v_head_dim index_head_dim rotary_dim linear_key_head_dim"
        " linear_value_head_dim linear_head_dim mamba_head_dim mamba_headdim state_size"
        " mamba_d_state ssm_state_size chunk_size mamba_chunk_size hidden_size_per_layer_input"
        " laurel_rank adapter_rank sliding_window",
    ),
    (
        4,
        "num_attention_heads n_head n_heads num_heads decoder_attention_heads"
        " encoder_attention_heads attention_heads num_encoder_attention_heads"
        " num_decoder_attention_heads swa_num_attention_heads num_experts n_routed_experts"
        " num_local_experts moe_num_experts index_n_heads mamba_num_heads linear_num_value_heads",
    ),
    (
        2,
        "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers"
        " num_encoder_layers num_blocks num_decoder_layers num_key_value_heads num_kv_heads"
        " swa_num_key_value_heads linear_num_key_heads num_experts_per_tok num_experts_per_token"
        " moe_k moe_topk index_topk num_query_groups",
    ),
    (
        1,
        "n_group topk_group n_groups num_expert_group first_k_dense_replace max_window_layers"
        " num_nextn_predict_layers bos_token_id eos_token_id sep_token_id cls_token_id"
        " mask_token_id decoder_start_token_id eod_token_id mask_index unk_index",
    ),
    (
        0,
        "pad_token_id",
    ),
)
SIZE = {name: size for size, names in SIZES for name in names.split()}
# what the head must not miss
LOUD = {
    **dict.fromkeys(heads.SOFTCAPS, 2.0),
    **dict.fromkeys(heads.SCALES, 0.7),
    "unpadded_vocab_size": 90,
    "lm_head_bias": True,
}
# lists with an entry for each layer: the config derives them from its sizes
DERIVED = {
    "layer_types",
    "mlp_layer_types",
    "layers_block_type",
    "attn_layers",
    "indexer_types",
    "moe_layers",
    "num_attention_heads_per_layer",
    "no_rope_layers",
    "hybrid_layer_ids",
    "full_attn_idxs",
    "activation_sparsity_pattern",
    "layer_rope_theta",
}
HYBRID = ["linear_attention", "hybrid", "hybrid"]
ROPE = {"rope_type": "default", "rope_theta": 1e4}
BY_TYPE = {
    "bamba": dict(mamba_n_heads=4, mamba_d_head=16),
    "cohere_compass_text": dict(rope_parameters={"full_attention": ROPE}),
    "dbrx": dict(attn_config=dict(kv_n_heads=2, clip_qkv=8.0, rope_theta=1e4)),
    "deepseek_v2": dict(num_experts_per_tok=2),
    "dots1": dict(n_shared_experts=1, n_routed_experts=4, num_experts_per_tok=2),
    "falcon_h1": dict(mamba_n_heads=4, mamba_d_head=8),
    "gemma3n_text": dict(intermediate_size=D),
    "gpt_neo": dict(attention_types=[[["global", "local"], 1]]),
    "granitemoehybrid": dict(mamba_n_heads=4, mamba_d_head=16),
    "hunyuan_v1_dense": dict(head_dim=8),
    "hunyuan_v1_moe": dict(head_dim=8),
    "lfm2": dict(layer_types=["conv", "full_attention"]),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"]),
    "longcat_flash": dict(zero_expert_num=2, head_dim=8),
    "mamba2": dict(num_heads=8, head_dim=8),
    "ministral": dict(head_dim=8),
    "nemotron": dict(num_key_value_heads=2),
    "reformer": dict(is_decoder=True, axial_pos_embds_dim=(16, 16), axial_pos_shape=(8, 8)),
    "xmod": dict(default_language="en_XX"),
    "zamba": dict(
        layers_block_type=HYBRID,
        num_hidden_layers=3,
        attention_hidden_size=64,
        attention_head_dim=16,
    ),
    "zamba2": dict(layers_block_type=HYBRID[:2]),
    "zaya": dict(num_experts_per_tok=1),
}
REFUSED = {
    "musicgen": "a head for each of several codebooks",
    "musicgen_melody": "a head for each of several codebooks",
    "prophetnet": "the head sees another stream than the backbone's first output",
}
NOT_BUILT = {
    "gemma3n": "its vision tower needs timm",
    "gemma4_assistant": "a draft model: it runs on another model's states",
    "gemma4_unified_assistant": "a draft model: it runs on another model's states",
}
MULTIMODAL = {
    "muse_glimmer": "MuseGlimmerForConditionalGeneration",
}


def tiny_config(config_class, **given):
    """A config of a few thousand parameters: the defaults of known names replaced, sub-configs
    likewise.
    """
    defaults = vars(config_class())
    names = set(inspect.signature(config_class.__init__).parameters)
    values = {}
    for name in names - DERIVED:
        default = defaults.get(name)
        if name in LOUD:
            values[name] = LOUD[name]
        elif name in SIZE and (
            name.endswith("token_id") or (isinstance(default, int) and default is not True)
        ):
            values[name] = SIZE[name]
        elif hasattr(default, "model_type"):
            values[name] = tiny_config(type(default))
    if "kv_lora_rank" in names:  # latent attention: heads of its own dims, each with its own keys
        values.pop("head_dim", None)
        values["num_key_value_heads"] = SIZE["num_attention_heads"]
    if "num_kv_shared_layers" in names:
        values["num_kv_shared_layers"] = 0
    return config_class(**{**values, **given})


def loud(model):
    """Biases that are not 0, and logits large enough to be bent by a cap."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                p.normal_(0, 0.3)
        if isinstance(getattr(model.get_output_embeddings(), "weight", None), Tensor):
            model.get_output_embeddings().weight.normal_(0, 0.3)
    return model.eval()


def build(model_type, class_name=None):
    model_class = getattr(transformers, class_name or CAUSAL_LMS[model_type])
    return loud(model_class(tiny_config(model_class.config_class, **BY_TYPE.get(model_type, {}))))
