import transformers

import griffin

model, tokenizer = griffin.load("smollm2-135m")
inputs = tokenizer("The history of the lighthouse begins", return_tensors="pt")
input_ids, mask = inputs["input_ids"], inputs["attention_mask"]
cache = transformers.DynamicCache(config=model.config)

with griffin.attach(model, density=0.5) as handle:
    with handle.prompt_phase():
        outputs = model(input_ids, attention_mask=mask, past_key_values=cache)  # once, or in chunks
    next_token = outputs.logits[:, -1:].argmax(dim=-1)
    with handle.generation_phase():
        outputs = model(next_token, past_key_values=cache)

print(tokenizer.decode(outputs.logits[0, -1].argmax()))
