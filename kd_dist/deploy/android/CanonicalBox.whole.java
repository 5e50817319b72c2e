package dev.kd_dist.student;

/** The part of an image that the student sees: all of it, stretched to the student's aspect ratio. */
public final class CanonicalBox {
    private CanonicalBox() {}

    /** Left, top, right and bottom edge in pixels, of an image of `width` x `height`. */
    public static int[] of(int width, int height) {
        return new int[] {0, 0, width, height};
    }
}
