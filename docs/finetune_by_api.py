"""Fine-tunes over the API of OPENAI_BASE_URL, such as http://127.0.0.1:8000/v1."""

import sys
import time
from pathlib import Path

from openai import OpenAI

client = OpenAI()
model, training, held_out = sys.argv[1:4]  # a name that the server has, two JSONL files
train = client.files.create(file=Path(training), purpose="fine-tune")
valid = client.files.create(file=Path(held_out), purpose="fine-tune")
job = client.fine_tuning.jobs.create(
    model=model, training_file=train.id, validation_file=valid.id, suffix="demo"
)
seen: set[str] = set()
while job.status not in ("succeeded", "failed", "cancelled"):
    time.sleep(1)
    job = client.fine_tuning.jobs.retrieve(job.id)
    for event in reversed(client.fine_tuning.jobs.list_events(job.id, limit=100).data):
        if event.id not in seen:
            print(event.message)
            seen.add(event.id)
assert job.fine_tuned_model, job.error
for checkpoint in client.fine_tuning.jobs.checkpoints.list(job.id):
    print(checkpoint.step_number, checkpoint.metrics.full_valid_loss)
answer = client.chat.completions.create(
    model=job.fine_tuned_model, messages=[{"role": "user", "content": "say abc 1"}], max_tokens=20
)
print(job.fine_tuned_model, "answers", repr(answer.choices[0].message.content))
