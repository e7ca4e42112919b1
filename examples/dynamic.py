import griffin

model, tokenizer = griffin.load("smollm2-135m")
inputs = tokenizer("The history of the lighthouse begins", return_tensors="pt")

with griffin.attach(model, density=0.5, selection="auto") as handle:  # half of the FF weights' bytes
    print(tokenizer.decode(model.generate(**inputs, max_new_tokens=60)[0]), handle.splits[0])
with griffin.attach(model, loss=0.05) as handle:  # the fewest bytes whose measured KL is at most 0.05 nats a token
    print(handle.config.density, handle.ff_bytes_per_token)
