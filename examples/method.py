"""A method of your own: a row in the registry, and its name works wherever the paper's methods do."""

import griffin
from griffin.method.selection import topk


def inverse(scores, k, seeds):
    return topk(-scores, k)


griffin.register_method(griffin.Method("inverse", "the neurons of smallest statistic: a control", select=inverse))

model, tokenizer = griffin.load("smollm2-135m")
prompt = "The history of the lighthouse begins"
for selection in ("topk", "inverse"):
    print(selection, griffin.generate(model, tokenizer, prompt, density=0.75, selection=selection, max_tokens=20).text)
