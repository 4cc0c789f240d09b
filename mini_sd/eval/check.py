"""How good is mini_sd? Images of prompts it has not seen, classified, and CLIP-T of the world's own images.

    python -m mini_sd.eval.check                        # the accuracy of each attribute, and a table of CLIP-T
    python -m mini_sd.eval.check --sheet check.png      # also write the images and print their prompts

Run it after pretrain.py: the results are in mini_sd/README.md.
"""

import argparse
import random
from dataclasses import replace

import torch

import model_utils as mu
import sample
from mini_sd.eval import classifier, evaluate
from mini_sd.make import world
from mini_sd.make.pretrain import TEST_SEED


def generate_from_captions(model, n, seed, device="cpu"):
    """Generate n images from full captions of single things in their own colours -> (images, pictures, prompts)."""
    rng, pictures = random.Random(seed), []
    while len(pictures) < n:
        picture = world.random_picture(rng)
        if picture.count == 1 and picture.style == "photo" and not picture.tone:
            pictures.append(picture)
    prompts = ["a photo of a " + world.noun_phrase(picture, rng, keep=1.0) for picture in pictures]
    options = mu.sampling_defaults(model) | {"batch_size": 24, "progress": False}
    images = list(sample.generate(mu.load_components(model, device), prompts, range(n), **options))
    return images, pictures, prompts


def correct_attributes(images, pictures):
    """{attribute: for each image, whether it has that of its picture}"""
    predictions = classifier.classify(classifier.load_classifier(), images)
    return {
        name: [found == classifier.class_of(picture, name) for found, picture in zip(found_of, pictures, strict=True)]
        for name, found_of in predictions.items()
    }


def clip_t_of_world(clip, concept, rng, count):
    """CLIP-T of images rendered by the world, `count` for each editing prompt -> three means.

    Of any such thing (a style concept: of any image in its base style) that is as the prompt says, of the concept as
    the prompt says, and of the concept not as it says. A CLIP that asks only for what the prompt says gives the second
    as much as the first, and the third little.
    """
    target, learnable_property, cosines = world.concept_picture(concept, 0), evaluate.property_of(concept), []
    same_thing = {"kind": target.kind} if learnable_property == "object" else {}
    attributes, prompts = evaluate.PROMPT_ATTRIBUTES[learnable_property], sample.EDITING_PROMPTS[learnable_property]
    for (name, value), prompt in zip(attributes, prompts, strict=True):
        asked, text = {name: value}, " ".join(prompt.replace("{}", "").split())
        others = []
        while len(others) < count:
            picture = world.random_picture(rng)
            if picture.style == target.style:
                others.append(replace(picture, tone=None, count=1))
        own = [replace(world.concept_picture(concept, rng.getrandbits(31)), count=1) for _ in range(count)]
        groups = [
            [replace(picture, **same_thing, **asked) for picture in others],
            [replace(picture, **asked) for picture in own],
            [picture for picture in own if replace(picture, **asked) != picture],
        ]
        images, texts = sample.embed(clip, [world.draw(picture) for group in groups for picture in group], [text])
        of_groups = (images @ texts[0]).split([len(group) for group in groups])
        cosines.append(torch.stack([of_group.mean() for of_group in of_groups]))
    return torch.stack(cosines).mean(dim=0).tolist()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=mu.DEFAULT_MODEL, help="folder that pretrain.py exported")
    parser.add_argument("--sheet", help="write the images, twelve a row, to this file and print their prompts")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    images, pictures, prompts = generate_from_captions(args.model, 96, TEST_SEED + 1, args.device)
    correct = correct_attributes(images, pictures)
    three = zip(correct["kind"], correct["colour"], correct["background"], strict=True)
    correct["kind, colour and background"] = [all(each) for each in three]
    both = zip(correct["accessory"], correct["accessory_colour"], pictures, strict=True)
    correct["accessory and its colour, where there is one"] = [a and b for a, b, picture in both if picture.accessory]
    for name, answers in correct.items():
        print(f"{name}: {sum(answers)} of {len(answers)} correct")
    if args.sheet:
        world.sheet(images, 12).save(args.sheet)
        print("\n".join(prompts))
    print("CLIP-T of the world's own images: of any such thing, of the concept, of the concept not as the prompt says")
    clip = sample.load_clip(args.model)
    for concept in evaluate.CONCEPTS:
        cosines = clip_t_of_world(clip, concept, random.Random(TEST_SEED), 64)
        print(f"{concept:10}" + "".join(f"{cosine:8.3f}" for cosine in cosines))


if __name__ == "__main__":
    main()
