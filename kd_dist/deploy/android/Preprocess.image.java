package dev.kd_dist.student;

/**
 * A decoded image as the student takes it: the box of {@link CanonicalBox}, scaled to the student's size and divided
 * by 255. Every level is the same as in training, whatever the size of the image.
 *
 * <p>Scaling is Pillow's: a triangle that reaches as far as the ratio of the sizes where it shrinks, else one pixel;
 * weights of 22 bits; across and down, each rounded to a level. Near the edges of the box it looks at pixels beyond.
 *
 * <p>Plain Java 8, without Android; safe to call from any thread.
 */
public final class Preprocess {
    private static final int BITS = 22;

    private Preprocess() {}

    /**
     * Pixels of an image, row by row, 0xAARRGGBB as Bitmap.getPixels gives them (A is not looked at), to the student's
     * input of StudentInfo.INPUT_SHAPE: red, green, blue, each row by row, from 0 to 1.
     */
    public static float[] input(int[] argb, int width, int height) {
        byte[] levels = levels(argb, width, height);
        float[] input = new float[levels.length];
        for (int i = 0; i < levels.length; i++) {
            input[i] = (levels[i] & 0xff) / 255f;
        }
        return input;
    }

    /** The levels, 0 to 255, that {@link #input} divides by 255: red, green, blue, each row by row. */
    public static byte[] levels(int[] argb, int width, int height) {
        if (width < 1 || height < 1 || (long) width * height != argb.length) {
            throw new IllegalArgumentException(argb.length + " pixels are no image of " + width + " x " + height);
        }
        int[] box = CanonicalBox.of(width, height);
        Taps across = new Taps(width, box[0], box[2], StudentInfo.WIDTH);
        Taps down = new Taps(height, box[1], box[3], StudentInfo.HEIGHT);
        boolean downFirst = @down_first@;
        int[] scaled = downFirst ? downFirst(argb, width, across, down) : acrossFirst(argb, width, across, down);
        int plane = StudentInfo.HEIGHT * StudentInfo.WIDTH;
        byte[] levels = new byte[3 * plane];
        for (int i = 0; i < plane; i++) {
            levels[i] = (byte) (scaled[i] >> 16);
            levels[plane + i] = (byte) (scaled[i] >> 8);
            levels[2 * plane + i] = (byte) scaled[i];
        }
        return levels;
    }

    private static int[] acrossFirst(int[] argb, int width, Taps across, Taps down) {
        int rows = down.end - down.start;
        int[] narrow = new int[rows * StudentInfo.WIDTH];
        scale(argb, down.start * width, width, 1, rows, across, narrow, StudentInfo.WIDTH, 1);
        int[] scaled = new int[StudentInfo.HEIGHT * StudentInfo.WIDTH];
        int above = -down.start * StudentInfo.WIDTH;
        scale(narrow, above, 1, StudentInfo.WIDTH, StudentInfo.WIDTH, down, scaled, 1, StudentInfo.WIDTH);
        return scaled;
    }

    private static int[] downFirst(int[] argb, int width, Taps across, Taps down) {
        int columns = across.end - across.start;
        int[] low = new int[StudentInfo.HEIGHT * columns];
        scale(argb, across.start, 1, width, columns, down, low, 1, columns);
        int[] scaled = new int[StudentInfo.HEIGHT * StudentInfo.WIDTH];
        scale(low, -across.start, columns, 1, StudentInfo.HEIGHT, across, scaled, StudentInfo.WIDTH, 1);
        return scaled;
    }

    /**
     * Scales lines, which are rows or columns. From line to line it is `line` pixels, along one `step`; in what is
     * made, `madeLine` and `madeStep`.
     */
    private static void scale(
            int[] pixels, int from, int line, int step, int lines, Taps taps, int[] made, int madeLine, int madeStep) {
        for (int i = 0; i < taps.first.length; i++) {
            int[] weights = taps.weights[i];
            for (int j = 0; j < lines; j++) {
                int at = from + j * line + taps.first[i] * step;
                int red = 1 << (BITS - 1);
                int green = red;
                int blue = red;
                for (int weight : weights) {
                    int pixel = pixels[at];
                    red += weight * (pixel >> 16 & 0xff);
                    green += weight * (pixel >> 8 & 0xff);
                    blue += weight * (pixel & 0xff);
                    at += step;
                }
                made[j * madeLine + i * madeStep] = level(red) << 16 | level(green) << 8 | level(blue);
            }
        }
    }

    private static int level(int sum) {
        return Math.max(0, Math.min(255, sum >> BITS));
    }

    /** Which pixels of a side, and how much of each, make each pixel of the scaled side. */
    private static final class Taps {
        final int[] first;
        final int[][] weights;
        final int start; // of all that are looked at
        final int end;

        /** A side of `length` pixels, of which `low` to `high` become `scaled` pixels. */
        Taps(int length, int low, int high, int scaled) {
            first = new int[scaled];
            weights = new int[scaled][];
            double ratio = (double) (high - low) / scaled;
            double reach = Math.max(1.0, ratio);
            for (int i = 0; i < scaled; i++) {
                double centre = low + (i + 0.5) * ratio;
                first[i] = Math.max(0, (int) (centre - reach + 0.5));
                double[] shares = new double[Math.min(length, (int) (centre + reach + 0.5)) - first[i]];
                double sum = 0;
                for (int k = 0; k < shares.length; k++) {
                    double distance = Math.abs((k + first[i] - centre + 0.5) * (1.0 / reach));
                    shares[k] = Math.max(0.0, 1.0 - distance);
                    sum += shares[k];
                }
                weights[i] = new int[shares.length];
                for (int k = 0; k < shares.length; k++) {
                    weights[i][k] = (int) (0.5 + shares[k] / sum * (1 << BITS));
                }
            }
            start = first[0];
            end = first[scaled - 1] + weights[scaled - 1].length;
        }
    }
}
