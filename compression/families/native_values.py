"""Values of config.json that Transformers 5.23 knows, so that a plan refuses others without importing it.

Generated from transformers.activations.ACT2FN, transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS, and the
annotations of the configuration classes of our families. Tests compare them with the installed Transformers.
"""

_ACTIVATIONS = """
gelu gelu_10 gelu_accurate gelu_fast gelu_new gelu_python gelu_python_tanh gelu_pytorch_tanh hardswish
laplace leaky_relu linear mish prelu quick_gelu relu relu2 relu6 sigmoid silu sqrtsoftplus swish tanh xielu
"""
ACTIVATIONS = frozenset(_ACTIVATIONS.split())
"""Names of activation functions."""

ROPE_TYPES: dict[str, frozenset[str]] = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "dynamic": frozenset({"factor"}),
    "yarn": frozenset({"factor"}),
    "longrope": frozenset({"short_factor", "long_factor"}),
    "llama3": frozenset({"factor", "low_freq_factor", "high_freq_factor"}),
    "proportional": frozenset(),
}
"""How rotary frequencies can be made -> the keys without which Transformers does not load the config."""

_NEVER_NULL = """
_remove_final_layer_norm activation_function attention_bias attention_dropout attention_multiplier
attn_scale attn_temperature_tuning decoder_sparse_step do_layer_norm_before dropout embd_pdrop
embedding_multiplier enable_bias ffn_dim floor_scale head_dim hidden_act hidden_activation hidden_size
init_std initializer_range interleave_moe_layer_step intermediate_size intermediate_size_mlp kv_lora_rank
layer_norm_elementwise_affine layer_norm_eps layerdrop logit_scale logits_scaling max_position_embeddings
max_window_layers mlp_bias moe_intermediate_size n_routed_experts n_shared_experts no_rope_layer_interval
num_attention_heads num_experts num_experts_per_tok num_hidden_layers num_local_experts num_mtp_layers
original_max_position_embeddings output_router_logits partial_rotary_factor qk_nope_head_dim
qk_rope_head_dim qkv_bias query_pre_attn_scalar resid_pdrop residual_multiplier rms_norm_eps
rope_local_base_freq rope_theta routed_scaling_factor router_aux_loss_coef router_jitter_noise
shared_expert_intermediate_size tie_word_embeddings use_cache use_qk_norm use_sliding_window vocab_size
first_k_dense_replace n_group topk_group v_head_dim
"""
NEVER_NULL = frozenset(_NEVER_NULL.split())
"""Keys whose null the configuration class of one of our families refuses, or its model cannot be built with.
In none of them does it mean anything else than that the key is absent."""
