"""200 captions as strangers write them: mojibake, HTML, odd white space, many scripts, emoji, very long, nearly empty."""
import random

HAND_MADE = [
    "cat", "A Photo Of TWO CATS", "two cats, on a sofa!", "!!!", "x" * 300,
    "it's a dog's life, they're GONE, I'D say, we'Ll see", "IT'S NOT 'S 'T 'RE", "don\u2019t \u201cquote\u201d me",
    "emoji 😀🐈‍⬛🇨🇭 and more 🎉", "两只猫在沙发上", "ДВЕ КОШКИ на диване", "قطتان على أريكة", "İstanbul'da İKİ kedi, ß and ﬁne",
    "a cat <|endoftext|> and a dog", "  spaces\tand\n\nlines \r\n everywhere  ", 'quotes "and", commas',
    "naïve cafe\u0301, zero\u200bwidth", "&lt;b&gt;bold&lt;/b&gt; &amp;amp; twice &amp;lt;",
    "caf&eacute; &#233; &#xE9;", "&nbsp;&nbsp;", "&copy; 2020 &mdash; all rights", "&notanentity; &amp",
    "&#0; &#xD800; &#x110000;", "â€œmojibakeâ€\x9d", "âœ” No problems", "schÃ¶n und grÃ¼n", "Ã©tÃ©", "l\u2019Ã©tÃ©",
    "ＦＵＬＬ ＷＩＤＴＨ １２３", "½ ⅓ ² ³ ₁", "Ⅷ ⅷ Ⓐ ⓐ", "ſpecial ſ 'ſ K Å", "e&#769; and e\u0301", "\u1e9bi\u0307", "ﷺ",
    "A\u030a\u0301", "a_b_c __init__ snake_case", "C++ & C# vs. F#", "100% — 50‰, $5, €6, £7", "1,234.56 (7/8)",
    "#hashtag @user", "https://example.com/a?b=c&amp;d=e#f", "C:\\path\\to\\file.jpg", "<html><body>text</body></html>",
    "{'json': [1, 2, null]}", "``code``", "¿Qué? ¡Sí!", "straße STRASSE", "ΣΊΣΥΦΟΣ ΦΣ", "ǅ ǆ Ǆ", "ปลา สอง ตัว",
    "हिन्दी में एक चित्र", "한국어 사진 두 장", "日本語の写真、二枚。", "עברית תמונה", "ภาพถ่ายแมวสองตัว", "ქართული", "Հայերեն",
    "ᏣᎳᎩ",
    "𝒞𝓊𝓇𝓈𝒾𝓋ℯ 𝔉𝔯𝔞𝔨𝔱𝔲𝔯", "👩‍👩‍👧‍👦 👍🏽 ☺️ ☺", "\u202eright to left\u202c", "soft\u00adhyphen", "\ufeffbom",
    "non\u00a0breaking\u2003em\u3000ideographic", "tab\vvertical\fform", "nul\x01\x02\x1f\x7f", "a\x1cb\x1db\x85c",
    "\u2028line\u2029paragraph", "\ue000 private \uffff", "���", "....", "-", "'", "''''", "\u00b4\u02bc\u2018\u2019",
    "ALL CAPS WITH 123 NUMBERS", "camelCaseWords AndPascalCase", "re-re-re-entry", "Dr. Smith's U.S.A. trip", "a" * 77,
    "a " * 80, "cat " * 74, "cat " * 75, "cat " * 76, "dog. " * 40, "café " * 60, "猫" * 100, "🐈" * 50,
    "[CLS [SEP [MASK", "</b> <unk <pad", "▁metaspace ▁▁", "a\u0345b", "ŉ Ǳ ŀ", "ÆØÅ æøå", "Þþ Ðð", "o͡o x̸ y̷", "﻿zero",
    "\u200d\u200c", "‰ ‱ ※ ‼ ⁉", "★ ☆ ♠ ♣ ♥ ♦", "∀x∈ℝ: ⌈x⌉ = −⌊−x⌋", "→ ⇒ ↔", "┌─┐ box", "ǋ ǌ", "ΐ ΰ ᾳ ᾼ",
]
WORDS = [
    "a", "photo", "of", "two", "Cats", "on", "the", "OLD", "red", "sofa", "near", "Zürich", "&amp;", "Genève,", "3",
    "dogs", "42", "it's", "don’t", "犬", "кот", "🐕", "(very)", "big!", "#1", "½",
]


def _draw(count):
    """Captions of words, of characters from many blocks, and of both."""
    generator = random.Random(18)
    blocks = [(0x20, 0x7E), (0xA1, 0x17F), (0x370, 0x3FF), (0x400, 0x4FF), (0x5D0, 0x5EA), (0x620, 0x64A), (0x900, 0x97F),
              (0x1E00, 0x1FFF), (0x2000, 0x206F), (0x20A0, 0x22FF), (0x2460, 0x24FF), (0x3040, 0x30FF), (0x4E00, 0x4F00),
              (0xFB00, 0xFB06), (0xFF01, 0xFF5E), (0x1F300, 0x1F5FF)]
    captions = []
    for number in range(count):
        words = generator.choices(WORDS, k=generator.randint(1, 60 if number % 5 == 0 else 12))
        for _ in range(number % 4):
            low, high = generator.choice(blocks)
            words.insert(generator.randrange(len(words) + 1), "".join(chr(generator.randint(low, high)) for _ in range(4)))
        captions.append(generator.choice([" ", " ", "  ", "\n"]).join(words))
    return captions


CAPTIONS = HAND_MADE + _draw(200 - len(HAND_MADE))
assert len(CAPTIONS) == 200
