import griffin

model, tokenizer = griffin.load("smollm2-135m")

inputs = tokenizer("The history of the lighthouse begins", return_tensors="pt")
with griffin.attach(model, density=0.5, selection="topk"):  # exactly the paper's method
    print(tokenizer.decode(model.generate(**inputs, max_new_tokens=60)[0]))
