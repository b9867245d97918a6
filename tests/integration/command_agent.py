"""A program as an agent, with nothing but the standard library: asks one question. Started by the tests as `agent: {command: [...]}`.

Questions about an even number always pay 1, so that their groups have no signal; the others pay the parity of the answer.
"""

import json
import os
import re
import urllib.request

task = json.loads(os.environ["AGL_TASK"])
body = {
    "model": os.environ["AGL_MODEL"],
    "messages": [{"role": "user", "content": task["question"]}],
}
request = urllib.request.Request(
    f"{os.environ['OPENAI_BASE_URL']}/chat/completions",
    json.dumps(body).encode(),
    {
        "Content-Type": "application/json",
        "Authorization": f"Bearer {os.environ['OPENAI_API_KEY']}",
    },
)
with urllib.request.urlopen(request, timeout=100) as answer:
    text = json.load(answer)["choices"][0]["message"]["content"] or ""
number = int(re.findall(r"\d+", task["question"])[0])
print(f"step {os.environ.get('AGL_STEP')}: asked about {number}")
print(json.dumps({"reward": 1.0 if number % 2 == 0 else float(sum(text.encode()) % 2)}))
