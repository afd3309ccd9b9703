"""twin_lm.py: a converted model as one of transformers': loaded by AutoModelForCausalLM, it writes through generate().

    import core.twin_lm                                            # registers the architecture
    model = AutoModelForCausalLM.from_pretrained("out/repr_align/block")
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, "left"
    ids = model.generate(**tokenizer(texts, padding=True, return_tensors="pt"), max_new_tokens=64, threshold=0.9)

Without the import its folder is of a type that transformers does not know: better than an AR model that it is not.

Letters: B batch, P prompt, T tokens, V vocabulary.
"""
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from core import masked
from core.backbone import TWIN, as_dtype
from core.common import UserError


class TwinConfig(PretrainedConfig):
    """That of the AR model it came from, under another name; core.backbone.read_config gives that one back."""
    model_type = TWIN


class TwinForCausalLM(PreTrainedModel):
    """A masked.Student that transformers knows how to load. It holds the student, which is saved by repr_align.py."""
    config_class = TwinConfig
    main_input_name = "input_ids"

    def __init__(self, config, student):
        super().__init__(config)
        self.student = student

    @classmethod
    def from_pretrained(cls, folder, *_, config=None, dtype=None, device="cpu", **__):
        student, _ = masked.load_converted(folder, torch.device(device), as_dtype(dtype))
        return cls(config or TwinConfig.from_pretrained(folder), student).eval()

    def forward(self, input_ids, attention_mask=None, **_):
        """Logits (B, T - 1, V): at i the law of token i + 1, whatever stands there being the mask or not."""
        if attention_mask is not None and not attention_mask.all():
            raise UserError("a converted model's logits are of whole texts: no padding")
        return CausalLMOutput(logits=self.student.logits(self.student.foretell(
            input_ids, input_ids == self.student.mask_id)))

    def generate(self, input_ids=None, attention_mask=None, max_new_tokens=64, do_sample=True, temperature=0.8,
                 top_p=1.0, sample_steps=0, threshold=0.0, order="confidence", drafts=0, seed=0, streamer=None,
                 **unknown):
        """Prompts (B, P), padded on the left, and max_new_tokens tokens after each, by masked.fill: one a call, or in
        sample_steps calls, or all that are certain enough in each; no end-of-text token ends it. With `drafts` and
        do_sample=False it is the greedy text of its AR mode, by masked.speculate. Raises UserError."""
        if unknown or input_ids is None or not input_ids.shape[1] or max_new_tokens < 1:
            raise UserError("generate() of a converted model needs a prompt and max_new_tokens; it knows no "
                            f"{', '.join(unknown) or 'other length'}")
        B, P = input_ids.shape
        mask = (torch.ones_like(input_ids) if attention_mask is None else attention_mask).long()
        known = mask.sum(1)                                                            # (B,): tokens but the padding
        if streamer is not None and (B > 1 or order in masked.TAKES_BACK):
            raise UserError("only one text at a time can be streamed, and none by an order that takes tokens back")
        if not mask[:, -1].all() or (mask.diff(dim=1) < 0).any():
            raise UserError("prompts must be padded on the left: tokenizer.padding_side = 'left'")
        if drafts and (do_sample or threshold or sample_steps):
            raise UserError("drafts are judged by the greedy text: add do_sample=False, no threshold, no sample_steps")
        out = torch.cat([input_ids, input_ids.new_full((B, max_new_tokens), self.student.mask_id)], 1)
        shown = int(known.max())

        def stream(ids, is_mask):                                                      # what no mask stands before
            nonlocal shown
            until = int((~is_mask[0]).cumprod(0).sum())
            if until > shown:
                streamer.put(ids[0, shown:until].cpu())
                shown = until
        if streamer is not None:
            streamer.put(input_ids.cpu())
        watch = stream if streamer is not None else None
        alike = [(known == n).nonzero()[:, 0].tolist() for n in known.unique()]         # texts of one length together
        for rows in [[row] for row in range(B)] if drafts else alike:
            start = P - int(known[rows[0]])
            ids = out[rows, start:]
            out[rows, start:] = masked.speculate(
                self.student, ids[:, :-max_new_tokens], max_new_tokens, drafts, watch) if drafts else masked.fill(
                self.student, ids, ids == self.student.mask_id, sample_steps or max_new_tokens,
                temperature if do_sample else 0.0, seed, order, top_p, threshold=threshold, watch=watch)
        if streamer is not None:
            streamer.end()
        return out


AutoConfig.register(TwinConfig.model_type, TwinConfig)
AutoModelForCausalLM.register(TwinConfig, TwinForCausalLM)
