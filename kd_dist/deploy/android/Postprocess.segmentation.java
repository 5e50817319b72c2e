package dev.kd_dist.student;

/** What the student's output says. Plain Java 8, without Android; safe to call from any thread. */
public final class Postprocess {
    private Postprocess() {}

    /**
     * The student's logits, maps of StudentInfo.OUTPUT_SHAPE, to the class of each pixel of a picture of `width` x
     * `height`, row by row: each map is scaled up bilinearly, then the largest wins. The class is `map[i] & 0xff`, an
     * index of StudentInfo.CLASS_NAMES. The maps cover the whole image.
     */
    public static byte[] classMap(float[] logits, int width, int height) {
        int classes = (int) StudentInfo.OUTPUT_SHAPE[1];
        int rows = (int) StudentInfo.OUTPUT_SHAPE[2];
        int columns = (int) StudentInfo.OUTPUT_SHAPE[3];
        byte[] map = new byte[width * height];
        for (int y = 0; y < height; y++) {
            float fromTop = source(y, rows, height);
            int above = Math.min((int) fromTop, rows - 1);
            int below = Math.min(above + 1, rows - 1);
            float low = fromTop - above;
            for (int x = 0; x < width; x++) {
                float fromLeft = source(x, columns, width);
                int left = Math.min((int) fromLeft, columns - 1);
                int right = Math.min(left + 1, columns - 1);
                float far = fromLeft - left;
                float largest = Float.NEGATIVE_INFINITY;
                for (int c = 0; c < classes; c++) {
                    int upper = (c * rows + above) * columns;
                    int lower = (c * rows + below) * columns;
                    float first = (1 - far) * logits[upper + left] + far * logits[upper + right];
                    float second = (1 - far) * logits[lower + left] + far * logits[lower + right];
                    float value = (1 - low) * first + low * second;
                    if (value > largest) {
                        largest = value;
                        map[y * width + x] = (byte) c;
                    }
                }
            }
        }
        return map;
    }

    /** Where the centre of a pixel of a side of `scaled` pixels lies on one of `length`, from the first centre on. */
    private static float source(int pixel, int length, int scaled) {
        return Math.max(0f, (float) length / scaled * (pixel + 0.5f) - 0.5f);
    }
}
