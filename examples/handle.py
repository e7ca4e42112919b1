import griffin

model, tokenizer = griffin.load("smollm2-135m")
inputs = tokenizer("The history of the lighthouse begins", return_tensors="pt")

handle = griffin.attach(model, griffin.GriffinConfig(density=0.5, selection="topk"))
model.generate(**inputs, max_new_tokens=60)
handle.experts[10]  # indices of the experts of layer 10, ascending
handle.statistic[10]  # the flocking statistic they were selected by
handle.detach()
