"""Units of a scene: the frame is FRAME wide and high at the product, which stands at the origin; the camera looks
along +y, at a wall WALL_Y or a backdrop BACKDROP_Y behind it."""

FRAME = 3.0
WALL_Y = 2.0
BACKDROP_Y = 7.0
