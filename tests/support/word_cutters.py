"""Custom segmenters for tests, used on the command line as `support.word_cutters:Class`."""

import multiprocessing
import os
import signal
import time

WORDS = ("苹果", "银行", "房子", "蓝山", "水果汁", "数据库")


class KnownWords:
    """Longest match from a list; any other character is a word."""

    def __init__(self, language: str) -> None:
        self.language = language

    def word_starts(self, text: str) -> list[int]:
        starts, at = [], 0
        while at < len(text):
            starts.append(at)
            at += max((len(word) for word in WORDS if text.startswith(word, at)), default=1)
        return starts


class OutOfRange(KnownWords):
    def word_starts(self, text: str) -> list[int]:
        return [0, len(text) + 1]


class Fractions(KnownWords):
    def word_starts(self, text: str) -> list[float]:
        return [0.0, 0.5]


class Unreadable(KnownWords):
    """Fails as if its word list were missing."""

    def __init__(self, language: str) -> None:
        raise FileNotFoundError(2, "No such file or directory", "words.txt")


class Failing(KnownWords):
    def word_starts(self, text: str) -> list[int]:
        raise RuntimeError("model\nlost")


class Mute:
    def __init__(self, language: str) -> None:
        pass


class NoLanguage:
    pass


class Slow(KnownWords):
    """Slow enough to be killed by a test."""

    def word_starts(self, text: str) -> list[int]:
        time.sleep(0.001)
        return super().word_starts(text)


class Deadly(KnownWords):
    """Kills its process at one text."""

    def word_starts(self, text: str) -> list[int]:
        if text == "die now":
            os._exit(9)
        return super().word_starts(text)


class Undisturbed(KnownWords):
    """Fails if Ctrl-C could end its worker process."""

    at_start = signal.pthread_sigmask(signal.SIG_BLOCK, [])

    def word_starts(self, text: str) -> list[int]:
        if multiprocessing.parent_process() is not None:
            assert signal.SIGINT in self.at_start
            assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
        return super().word_starts(text)
