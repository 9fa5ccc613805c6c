"""A server that answers like a judge model, so that the example runs without one: 10 where the right answer is given.

Usage: python pretended_judge.py PORT
"""

import http.server
import json
import re
import sys


class Judge(http.server.BaseHTTPRequestHandler):
    """Answers chat completions."""

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = asked["messages"][-1]["content"]
        right, answer = (re.search(rf"^{title}: *(.*)$", prompt, re.MULTILINE) for title in ("Right answer", "Answer"))
        mark = 10 if right and answer and right[1] in answer[1].split() else 2
        reply = json.dumps({"choices": [{"message": {"role": "assistant", "content": f"{mark}"}}]}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, *_: object) -> None:
        """Prints nothing."""


if __name__ == "__main__":
    with http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Judge) as server:
        server.serve_forever()
