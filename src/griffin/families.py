"""The families of models, and what differs between them: one row of data a family, not a class.

Three places read the rows. `griffin.layouts` finds FF blocks by their layouts, `engine.native_decoder` runs the
families with a `norm_offset`, and the vLLM plugin finds FF blocks in vLLM's models by the same layouts. A family that
has no row can be pruned too, if its FF block has one of the layouts.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Layout:
    """The names of the projections of an FF block.

    Args:
        inputs: attribute names of the projections that read the block's input; two when gated.
        output: attribute name of the projection that writes the block's output.
        fused: the only input projection holds the gate's rows and then the up projection's rows (Phi-3).
    """

    inputs: tuple[str, ...]
    output: str
    fused: bool = False

    def __post_init__(self) -> None:
        if not self.inputs or (self.fused and len(self.inputs) != 1):
            raise ValueError(f"{self} needs one input projection or more, and exactly one if it is fused")

    def __str__(self) -> str:
        return f"{' + '.join(self.inputs)}{' (gate and up fused)' if self.fused else ''} -> {self.output}"

    @property
    def gated(self) -> bool:
        """Whether the block has a gate."""
        return self.fused or len(self.inputs) > 1


@dataclass(frozen=True)
class Family:
    """One row.

    Args:
        model_type: of the text model's config in Transformers.
        title: the family's name in documentation.
        layout: of its FF blocks.
        norm_offset: what its RMSNorm adds to its weight. `None` where the native generation step does not run the
            family: it runs decoders of Llama's shape only, and a family's first row here needs a test against its own
            forward pass.
        window_in_config: every layer has the config's `sliding_window`; other families say it in their attention.
    """

    model_type: str
    title: str
    layout: Layout
    norm_offset: float | None = None
    window_in_config: bool = False


_GATED = Layout(("gate_proj", "up_proj"), "down_proj")
_FUSED = Layout(("gate_up_proj",), "down_proj", fused=True)
_UP_DOWN = Layout(("up_proj",), "down_proj")
_C_FC = Layout(("c_fc",), "c_proj")  # Conv1D or Linear
_FC_IN = Layout(("fc_in",), "fc_out")
_FC1 = Layout(("fc1",), "fc2")
_DENSE = Layout(("dense_h_to_4h",), "dense_4h_to_h")

# In the order in which layouts are tried: a block that has gate_proj must not be taken for an ungated one.
FAMILIES: tuple[Family, ...] = (
    Family("llama", "Llama", _GATED, norm_offset=0.0),
    Family("mistral", "Mistral", _GATED, norm_offset=0.0, window_in_config=True),
    Family("ministral", "Ministral", _GATED),
    Family("ministral3", "Ministral 3", _GATED),
    Family("qwen2", "Qwen 2", _GATED, norm_offset=0.0),
    Family("qwen3", "Qwen 3", _GATED, norm_offset=0.0),
    Family("qwen3_5_text", "Qwen 3.5", _GATED),
    Family("gemma", "Gemma", _GATED, norm_offset=1.0),
    Family("gemma2", "Gemma 2", _GATED, norm_offset=1.0),
    Family("gemma3_text", "Gemma 3", _GATED, norm_offset=1.0),
    Family("gemma4_text", "Gemma 4", _GATED),
    Family("vaultgemma", "VaultGemma", _GATED),
    Family("olmo", "OLMo", _GATED),
    Family("olmo2", "OLMo 2", _GATED),
    Family("olmo3", "OLMo 3", _GATED),
    Family("smollm3", "SmolLM 3", _GATED, norm_offset=0.0),
    Family("stablelm", "StableLM", _GATED),
    Family("granite", "Granite", _GATED, norm_offset=0.0),
    Family("cohere", "Cohere", _GATED),
    Family("cohere2", "Cohere 2", _GATED),
    Family("exaone4", "EXAONE 4", _GATED),
    Family("helium", "Helium", _GATED),
    Family("hunyuan_v1_dense", "Hunyuan", _GATED),
    Family("seed_oss", "Seed-OSS", _GATED),
    Family("ernie4_5", "ERNIE 4.5", _GATED),
    Family("internlm3", "InternLM 3", _GATED),
    Family("minicpm3", "MiniCPM 3", _GATED),
    Family("falcon_h1", "Falcon-H1", _GATED),
    Family("bamba", "Bamba", _GATED),
    Family("phi3", "Phi-3", _FUSED),
    Family("glm", "GLM", _FUSED),
    Family("glm4", "GLM-4", _FUSED),
    Family("nemotron", "Nemotron", _UP_DOWN),
    Family("arcee", "Arcee", _UP_DOWN),
    Family("apertus", "Apertus", _UP_DOWN),
    Family("jais2", "Jais 2", _UP_DOWN),
    Family("mpt", "MPT", _UP_DOWN),
    Family("gpt2", "GPT-2", _C_FC),
    Family("gpt_bigcode", "GPT-BigCode", _C_FC),
    Family("gpt_neo", "GPT-Neo", _C_FC),
    Family("starcoder2", "Starcoder 2", _C_FC),
    Family("gptj", "GPT-J", _FC_IN),
    Family("codegen", "CodeGen", _FC_IN),
    Family("opt", "OPT", _FC1),  # in the decoder layer itself
    Family("phi", "Phi", _FC1),
    Family("xglm", "XGLM", _FC1),
    Family("biogpt", "BioGPT", _FC1),
    Family("gpt_neox", "GPT-NeoX", _DENSE),
    Family("bloom", "BLOOM", _DENSE),
    Family("falcon", "Falcon", _DENSE),
    Family("persimmon", "Persimmon", _DENSE),
)

LAYOUTS: tuple[Layout, ...] = tuple(dict.fromkeys(family.layout for family in FAMILIES))
BY_TYPE = {family.model_type: family for family in FAMILIES}
