import griffin

model, tokenizer = griffin.load("smollm2-135m")

config = griffin.GriffinConfig(density=0.75)
result = griffin.generate(model, tokenizer, "Once upon a time", griffin=config, max_tokens=60)
print(result.text, result.generation_tokens_per_s, result.selection_ms, result.ff_bytes_per_token)
messages = [{"role": "user", "content": "Hello"}]
for piece in griffin.stream_generate(model, tokenizer, messages, griffin=config, max_tokens=60):
    print(piece.text, end="")
