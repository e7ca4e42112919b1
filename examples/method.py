"""A method of one's own beside the paper's: a function, and it is there under its name."""

import griffin
from griffin.method.selection import register, topk


@register("inverse", "the neurons of smallest statistic: a control")
def inverse(scores, k, seeds):
    return topk(-scores, k)


model, tokenizer = griffin.load("smollm2-135m")
prompt = "The history of the lighthouse begins"
for selection in ("topk", "inverse"):
    config = griffin.GriffinConfig(density=0.75, selection=selection)
    print(selection, griffin.generate(model, tokenizer, prompt, griffin=config, max_tokens=20).text)
