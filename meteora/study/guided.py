"""The scaffold of protocol `guided`: numbers are written for the model, the answers between them are its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import LogitsProcessor


class GuidedNumbering(LogitsProcessor):
    """Writes `1.`, and at every end of a line or of the text the next number, until all answers stand.

    A number is followed by a space in the transcript because the model writes it: in the tokenizers of Llama and
    SmolLM2 a space belongs to the word that follows, so a forced space would leave the model with a word it never saw
    there. An answer that reaches its limit is ended by a forced line break, so that one that rambles takes nothing
    from the others. Works in `TranscriptBatch.decode` and, for greedy search, in
    `model.generate(logits_processor=[...])`.

    Args:
        tokenizer: of the model.
        limits: for each numbered answer its most tokens, the line break not counted.
        prompt_length: width of the prompt if the processor is given prompt and generated tokens together, as by
            `generate`.
    """

    def __init__(self, tokenizer, limits: Sequence[int], *, prompt_length: int = 0) -> None:
        if min(limits, default=0) < 1:
            raise ValueError(f"there must be limits, and each at least 1, not {list(limits)}.")
        self.tokenizer, self.limits, self.n = tokenizer, list(limits), len(limits)
        self.prompt_length = prompt_length
        self.eos = tokenizer.eos_token_id
        line_break = tokenizer.encode("\n", add_special_tokens=False)
        self.line_break = line_break[-1]
        # a number as it is tokenised at the beginning of a line
        self.numbers = [
            tokenizer.encode(f"\n{i}.", add_special_tokens=False)[len(line_break) :] for i in range(1, self.n + 1)
        ]
        pieces = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
        self.ends_line = {token for token, piece in enumerate(pieces) if piece.endswith("\n")}
        # a line must end where a token ends, or the rest of the token would stand before the next number
        self.forbidden = [token for token, piece in enumerate(pieces) if "\n" in piece.rstrip("\n")]
        ends = torch.zeros(len(pieces) + 1, dtype=torch.bool)  # the last stands for ids that the tokenizer has not
        ends[list(self.ends_line)] = True
        self._tables = {
            torch.device("cpu"): {
                "ends": ends,
                "forbidden": torch.tensor(self.forbidden, dtype=torch.int64),
                "numbers": pad_sequence([torch.tensor(number) for number in self.numbers], batch_first=True),
                "lengths": torch.tensor([len(number) for number in self.numbers]),
                "limits": torch.tensor(self.limits),
            }
        }

    @property
    def max_new_tokens(self) -> int:
        """What the whole list can need: every number, answer and line break."""
        return sum(map(len, self.numbers)) + sum(self.limits) + self.n

    def split(self, generated: list[int]) -> tuple[list[list[int]], int | None]:
        """Take a generated list apart.

        Returns:
            The answers so far (token lists, without tokens that are line breaks alone), and the token that the scaffold wants next:
            `None` leaves the choice to the model.
        """
        answers: list[list[int]] = []
        at = 0
        for number, limit in zip(self.numbers, self.limits, strict=True):
            written = len(generated) - at
            if written < len(number):
                return answers, number[written]
            at += len(number)
            answer: list[int] = []
            answers.append(answer)
            while at < len(generated) and generated[at] not in self.ends_line:
                answer.append(generated[at])
                at += 1
            if at == len(generated):
                if len(answer) < limit:
                    return answers, None
                return answers, self.eos if len(answers) == self.n else self.line_break
            if self.tokenizer.decode([generated[at]]).strip("\n"):  # such as ".\n", of which `text` strips the break
                answer.append(generated[at])
            at += 1
        return answers, self.eos

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores (B, V) in which the scaffold's token, where it has one, is the only choice."""
        scores = scores.clone()
        if self.forbidden:
            scores.index_fill_(1, self._on(scores.device, "forbidden"), -torch.inf)
        wanted = self._wanted(input_ids[:, self.prompt_length :], scores.argmax(-1))
        forced = (wanted >= 0).unsqueeze(1)
        only = torch.full_like(scores, -torch.inf).scatter_(1, wanted.clamp(min=0).unsqueeze(1), 0.0)
        return torch.where(forced, only, scores)

    def _wanted(self, generated: torch.Tensor, best: torch.Tensor) -> torch.Tensor:
        """What `split` wants next, for all rows at once and without waiting for a GPU: (B,), -1 where it is ``best``.

        Args:
            generated: (B, t).  best: (B,), the model's own choice, which is not always the one to be made.
        """
        device, t = generated.device, generated.shape[1]
        known = self._on(device, "ends")
        ends = known[generated.clamp(max=len(known) - 1)]  # (B, t)
        answered = ends.sum(1)  # answers that have ended, (B,)
        places = torch.arange(1, t + 1, device=device)
        written = t - (ends * places).amax(1) if t else answered  # tokens since the line began
        current = answered.clamp(max=self.n - 1)
        length = self._on(device, "lengths")[current]
        numbers = self._on(device, "numbers")
        number = numbers[current, written.clamp(max=numbers.shape[1] - 1)]
        last = current == self.n - 1
        full = written - length >= self._on(device, "limits")[current]
        # where the model ends the text, this answer is over, and the next one begins
        over = full | ((best == self.eos) & ~last)
        end = torch.where(last, self.eos, self.line_break)
        inside = torch.where(over, end, -1)
        wanted = torch.where(written < length, number, inside)
        return torch.where(answered >= self.n, self.eos, wanted)

    def _on(self, device: torch.device, name: str) -> torch.Tensor:
        """One of the scaffold's tables where it is needed."""
        if device not in self._tables:
            self._tables[device] = {key: table.to(device) for key, table in self._tables[torch.device("cpu")].items()}
        return self._tables[device][name]

    def text(self, generated: list[int]) -> str:
        """The list as text, one `i. answer` a line."""
        answers, _ = self.split(generated)
        texts = [self.tokenizer.decode(answer, skip_special_tokens=True).strip() for answer in answers]
        return "\n".join(f"{i}. {text}" for i, text in enumerate(texts, start=1))
